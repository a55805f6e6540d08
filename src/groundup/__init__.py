"""groundup trains language models from the ground up: raw text in, a chatting model out."""
