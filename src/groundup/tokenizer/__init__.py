"""From text to ids: byte-level BPE and the encoding of chats."""
