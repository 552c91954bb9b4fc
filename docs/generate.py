"""Write the generated pages: `make docs`. tests/test_docs.py fails while one is stale."""

import sys
from pathlib import Path
from runpy import run_path

from trainc.compiler.catalog import catalog
from trainc.dsl.printing.reference_pages import constructs_page, rules_page

HERE = Path(__file__).parent


def pages() -> dict[Path, str]:
    """Return every generated page's text by its path."""
    return {
        HERE / "constructs.md": constructs_page(catalog()),
        HERE / "diagnostics.md": rules_page(),
        HERE / "measured.md": run_path(str(HERE / "measured.py"))["measured_page"](),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(HERE.parent), file=sys.stderr)
