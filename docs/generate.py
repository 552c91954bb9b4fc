"""Write the generated files: `make docs`. tests/test_docs.py fails while one is stale."""

import sys
from pathlib import Path
from runpy import run_path

from trainc import functional
from trainc.compiler.catalog import catalog
from trainc.dsl.printing.reference_pages import constructs_page, rules_page

HERE = Path(__file__).parent

STUB = '''"""Written by `make docs`: the types of what functional.py finds on disk."""

{imports}

__all__ = [
{names}
]
'''


def functional_stub() -> str:
    """Return the stub of trainc.functional, whose names are found on disk where no type checker looks."""
    homes: dict[str, list[str]] = {}
    for name in sorted(functional.__all__):
        homes.setdefault(getattr(functional, name).__module__, []).append(name)
    return STUB.format(
        imports="\n".join(f"from {home} import {', '.join(homes[home])}" for home in sorted(homes)),
        names="\n".join(f'    "{name}",' for name in sorted(functional.__all__)),
    )


def pages() -> dict[Path, str]:
    """Return every generated file's text by its path."""
    return {
        HERE.parent / "trainc/functional.pyi": functional_stub(),
        HERE / "constructs.md": constructs_page(catalog()),
        HERE / "diagnostics.md": rules_page(catalog()),
        HERE / "adding-a-construct.md": run_path(str(HERE / "guide.py"))["guide_page"](),
        HERE / "claims.md": run_path(str(HERE / "claims.py"))["claims_page"](),
        HERE / "composition.md": run_path(str(HERE / "composition.py"))["composition_page"](),
        HERE / "measured.md": run_path(str(HERE / "measured.py"))["measured_page"](),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(HERE.parent), file=sys.stderr)
