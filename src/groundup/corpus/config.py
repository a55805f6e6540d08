"""The recipe's `corpus:` section."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from groundup.base.config import COSMETIC, Config


class FiltersConfig(Config):
    """Thresholds of the filters; a document outside one is left out and counted under the filter's name."""

    min_characters: NonNegativeInt = 1
    """Fewest characters that are not whitespace."""
    max_characters: PositiveInt | None = None
    """Most characters; None keeps any length."""
    max_symbol_fraction: float | None = Field(None, ge=0, le=1)
    """Largest share of characters that are neither letters, digits nor whitespace."""
    max_digit_fraction: float | None = Field(None, ge=0, le=1)
    """Largest share of characters that are digits."""
    max_repeated_line_fraction: float | None = Field(None, ge=0, le=1)
    """Largest share of characters in lines that occurred before in the document (Gopher, arXiv:2112.11446)."""
    max_repeated_ngram_fraction: float | None = Field(None, ge=0, le=1)
    """Largest share of word 5-grams that occurred before in the document (Gopher, arXiv:2112.11446)."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes to keep, by py3langid; empty keeps all and loads no language model."""


class DedupConfig(Config):
    """Exact duplicates by SHA-256 of the text, near duplicates by MinHash (Broder 1997) and a true Jaccard check."""

    exact: bool = True
    """Keep the first of equal texts."""
    near: bool = True
    """Keep the first of texts whose 5-gram sets are similar."""
    jaccard_threshold: float = Field(0.8, gt=0, le=1)
    """Similarity of the sets of word 5-grams from which two documents are near duplicates."""
    num_permutations: PositiveInt = 128
    """Hash functions a MinHash signature is made of."""
    num_bands: PositiveInt = 16
    """Bands the signature is cut into; documents that agree in one band are compared."""

    @model_validator(mode="after")
    def _bands_divide(self) -> Self:
        if self.num_permutations % self.num_bands:
            raise ValueError(f"{self.num_permutations=} must be a multiple of {self.num_bands=}")
        return self


class CorpusConfig(Config):
    """Where the text comes from and how it is cleaned."""

    source: str | list[str]
    """Files, folders or globs; `embedded` is the Python standard library's own sources."""
    text_field: str = "text"
    """Name of the text's field in jsonl, json, csv and parquet rows."""
    max_document_bytes: PositiveInt = 16 << 20
    """A row larger than this is quarantined without being parsed."""
    max_piece_bytes: int = Field(64 << 10, ge=16)
    """txt, md and source files are cut at paragraph borders into pieces of at most this size."""
    allow_truncated: bool = False
    """Go on with what was read of a compressed file that ends too early."""
    max_expansion_ratio: PositiveInt = 200
    """A compressed file that grows by more than this is refused."""
    on_bad_row: Literal["quarantine", "error"] = "quarantine"
    """A row that cannot be used is set aside with its bytes, or ends the stage."""
    max_bad_fraction: float | None = Field(None, ge=0, le=1)
    """Largest share of quarantined rows; above it the stage ends with an error, after every good row is written."""
    control_characters: Literal["strip", "keep"] = "strip"
    """Strip or keep the C0 and C1 controls other than tab and line feed."""
    fix_text: bool = False
    """Mend wrongly decoded text with ftfy."""
    filters: FiltersConfig = FiltersConfig()
    dedup: DedupConfig = DedupConfig()
    num_workers: PositiveInt | Literal["auto"] = Field("auto", json_schema_extra=COSMETIC)
    """Processes that clean beside the one that reads; `auto` is the number of cores for inputs above 8 MB, else 1."""
