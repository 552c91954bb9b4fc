"""Files of tokens, as they are prepared for large corpora: 16 or 32 bits each, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.compiler.constructs.data._files import Files, fingerprint
from trainc.compiler.model.import_path import ImportProblem

if TYPE_CHECKING:
    from pathlib import Path

    from trainc.runtime.sources.windows import Shard


class Tokens(Files):
    """Reads windows of tokens from files, which are mapped into memory and not loaded.

    A file is unsigned numbers of `dtype` in the byte order of the machine, without a header. A sample is `context`
    tokens in a row, and its targets are the tokens after each of them. Samples are consecutive and do not reach from
    one file into the next: a file of n tokens has (n - 1) // context of them. Their order is the run's; a sample's
    index counts the samples of all files in the order of their names.

    Files that match `evaluation` are not trained on, also where they match the first pattern. `trainc plan` knows the
    number of samples from the sizes of the files.
    """

    cite: ClassVar = "trainc"
    usage: ClassVar = 'data tokens("data/*.bin") { batch = 32 samples, context = 1024 }'

    dtype: Literal["uint16", "uint32"] = Field(
        default="uint16", description="the numbers in the files"
    )

    def load(self) -> Any:
        """Return the windows of the files; they are mapped when they are first read."""
        from trainc.runtime.sources.windows import count_windows, token_data

        train, held_out = self.files()
        shards, held_out_shards = self._shards("path", train), self._shards("evaluation", held_out)
        sums = [
            sum(count_windows(one.length, self.context) for one in s)
            for s in (shards, held_out_shards)
        ]
        self.require_windows(self.trained(sums[0]), sums[1] if held_out else None)
        return token_data(
            shards, held_out_shards, self.fraction, self.context, fingerprint(train), self.workers
        )

    def count(self) -> tuple[int | None, int | None]:
        """Return the number of samples by the sizes of the files; None where there are none yet."""
        return self.count_by_size(2 if self.dtype == "uint16" else 4)

    def _shards(self, field: str, paths: list[Path]) -> list[Shard]:
        from trainc.runtime.sources.windows import Shard

        try:
            return [Shard(path, self.dtype) for path in paths]
        except ValueError as error:
            raise ImportProblem("data-failed", str(error), field=field) from error
