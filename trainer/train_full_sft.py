"""Fine-tuning of all weights with MiniMind's flags: python trainer/train_full_sft.py --data_path chats.jsonl"""

from collections.abc import Sequence

from minimind import Door, open_door

DOOR = Door(
    stage="sft",
    about="Fine-tune every weight of a pretrained model on chats, with MiniMind's flags and recipe.",
    name_flag="save_weight",
    name="full_sft",
    epochs=2,
    batch_size=16,
    learning_rate=1e-5,
    accumulation_steps=1,
    log_interval=100,
    max_seq_len=768,
    data="../dataset/sft_t2t_mini.jsonl",
    from_weight="pretrain",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the door."""
    open_door(DOOR, arguments)


if __name__ == "__main__":
    main()
