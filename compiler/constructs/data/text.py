"""Files of text, cut into bytes or by a tokenizer of the user's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.compiler.constructs.data._files import Files, fingerprint
from trainc.compiler.model.import_path import ImportProblem, import_callable
from trainc.dsl.reading.construct import ImportPath

if TYPE_CHECKING:
    from pathlib import Path

    from trainc.runtime.sources.windows import InMemory


class Text(Files):
    """Reads files of text as one sequence of tokens, in the order of their names.

    With `tokenizer = bytes` the tokens are the bytes of the files, 0 to 255, and a 0 stands after each file. A
    tokenizer `module:callable` takes the text of a file, read as UTF-8, and returns the ids of its tokens, those that
    mark its beginning or its end included. A sample is `context` tokens in a row, and its targets are the tokens after
    each of them. All tokens are in memory: for large corpora write them to files once, and read these by `data tokens`.

    Files that match `evaluation` are not trained on, also where they match the first pattern. `trainc plan` knows the
    number of samples of bytes from the sizes of the files; with a tokenizer, `trainc run` counts them.
    """

    cite: ClassVar = "trainc"
    usage: ClassVar = 'data text("corpus/**/*.txt") { batch = 32 samples, context = 256 }'

    tokenizer: Literal["bytes"] | ImportPath = Field(
        default="bytes", description="`bytes`, or a function from text to ids, as `module:callable`"
    )

    def load(self) -> Any:
        """Return the windows of the texts, which are read and cut into tokens here."""
        from trainc.runtime.sources.texts import text_of_bytes
        from trainc.runtime.sources.windows import count_windows, token_data

        train, held_out = self.files()
        tokens, others = self._tokens(train), self._tokens(held_out)
        counts = [count_windows(one.length, self.context) for one in (tokens, others)]
        self.require_windows(self.trained(counts[0]), counts[1] if held_out else None)
        found = token_data(
            [tokens],
            [others] if held_out else [],
            self.fraction,
            self.context,
            fingerprint(train),
            self.workers,
        )
        return replace(found, decode=text_of_bytes) if self.tokenizer == "bytes" else found

    def count(self) -> tuple[int | None, int | None]:
        """Return the number of samples of bytes by the sizes of the files."""
        return self.count_by_size(1, end=1) if self.tokenizer == "bytes" else (None, self.context)

    @property
    def count_help(self) -> str:
        """What to write where the samples are not counted before the run."""
        if self.tokenizer == "bytes":
            return super().count_help
        return "only `trainc run` calls the tokenizer: write steps or samples"

    def _tokens(self, paths: list[Path]) -> InMemory:
        """Return the tokens of all files in a row."""
        from trainc.runtime.sources.texts import NoText, NoTokens, bytes_of, ids_of

        if self.tokenizer == "bytes":
            return bytes_of(paths)
        try:
            return ids_of(paths, import_callable(self.tokenizer, "tokenizer"))
        except NoTokens as error:
            message = f"`{self.tokenizer}` {error}"
            raise ImportProblem("data-failed", message, field="tokenizer") from error
        except NoText as error:
            help_ = "name files of text alone, or write `tokenizer = bytes`"
            raise ImportProblem("data-failed", str(error), help_) from error
