"""An adapter with MiniMind's flags: python trainer/train_lora.py --data_path chats.jsonl; saved merged, and apart."""

from collections.abc import Sequence

from minimind import Door, open_door

DOOR = Door(
    stage="lora",
    about="Train a LoRA adapter on chats and merge it, with MiniMind's flags and recipe.",
    name_flag="lora_name",
    name="lora_medical",
    epochs=10,
    batch_size=32,
    learning_rate=1e-4,
    accumulation_steps=1,
    log_interval=10,
    max_seq_len=340,
    data="../dataset/lora_medical.jsonl",
    from_weight="full_sft",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the door."""
    open_door(DOOR, arguments)


if __name__ == "__main__":
    main()
