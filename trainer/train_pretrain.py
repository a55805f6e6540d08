"""Pretraining with MiniMind's flags: python trainer/train_pretrain.py --data_path text.jsonl --hidden_size 128"""

from collections.abc import Sequence

from minimind import Door, open_door

DOOR = Door(
    stage="pretrain",
    about="Pretrain a model on text, with MiniMind's flags and recipe.",
    name_flag="save_weight",
    name="pretrain",
    epochs=2,
    batch_size=32,
    learning_rate=5e-4,
    accumulation_steps=8,
    log_interval=100,
    max_seq_len=340,
    data="../dataset/pretrain_t2t_mini.jsonl",
    from_weight="none",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the door."""
    open_door(DOOR, arguments)


if __name__ == "__main__":
    main()
