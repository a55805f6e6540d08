"""From ids to batches: the token store, packing, chat rows."""
