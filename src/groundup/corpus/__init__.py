"""From raw files to clean documents: readers, normalisation, filters, dedup."""
