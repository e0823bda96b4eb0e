"""House rules that a machine can check."""

import ast
import io
import re
import statistics
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "salt_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(PACKAGE).as_posix() for path in FILES]
LAYERS = [  # a file imports only from files of earlier layers
    {
        "averaging",
        "errors",
        "experts",
        "old_names",
        "journal",
        "packed",
        "pieces",
        "quantized",
        "row_pass",
        "row_set",
        "streams",
        "watch",
    },
    {"flops", "order", "progress"},
    {
        "attention",
        "chunked_head",
        "curves",
        "endings",
        "examples",
        "folders",
        "meter",
        "mixture",
        "optim",
        "preflight",
        "processes",
        "progress_bar",
        "run_folder",
        "run_lock",
        "scores",
    },
    {"device", "kinds", "runlog"},
    {"results", "stretches"},
    {"metrics", "settings", "shards", "slurm", "sources", "token_files", "triton_rows"},
    {"wrong_names"},
    {
        "command_line",
        "damage",
        "difficulty",
        "documents",
        "event_log",
        "losses",
        "meeting",
        "peers",
        "report",
        "rows",
        "spec",
    },
    {"figure", "lineage", "little", "own_code", "parse", "parser", "quiet", "run_config"},
    {"remarks", "tokenizer"},
    {"compare", "encoder", "example_rows", "models", "probe", "selection"},
    {"schedule"},
    {"alike", "buckets", "cadence", "card", "parallel", "score_report", "token_ids"},
    {"export", "extension", "prepare", "restart", "scoring"},
    {"answers", "checkpoint", "data"},
    {"module"},
    {"memory"},
    {"check", "resume"},
    {"cli", "__init__"},
    {"__main__"},
]


def code_lines(path: Path) -> int:
    """Lines with code on them: neither blank, nor comment, nor docstring."""
    source = path.read_text()
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(lines)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_and_functions_stay_small(path):
    assert code_lines(path) <= 330
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and "triton.jit" not in map(ast.unparse, node.decorator_list):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length <= 60, f"{node.name}: {length} lines"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_point_one_way(path):
    layer = next((i for i, names in enumerate(LAYERS) if path.stem in names), None)
    assert layer is not None, f"put {path.stem} into LAYERS, above all files that it imports from"
    allowed = {"__version__"}.union(*LAYERS[:layer])
    for node in ast.parse(path.read_text()).body:
        top, *parts = (getattr(node, "module", None) and node.module.split(".")) or [""]
        if isinstance(node, ast.ImportFrom) and top == "salt_lightning":
            of_folder = PACKAGE.joinpath(*parts).is_dir()
            stems = {alias.name for alias in node.names} if of_folder else {parts[-1]}
            assert stems <= allowed, f"{path.name} imports {stems}"


def test_every_file_is_in_contributing():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert [path.stem for path in FILES if path.stem != "__init__" and not re.search(rf"\b{path.stem}\b", page)] == []
    assert [folder for folder in {*map(Path, NAMES)} if str(folder.parent) not in page] == []


PAGES = sorted(
    str(path.relative_to(ROOT)) for folder in (".", "docs", "benchmarks") for path in (ROOT / folder).glob("*.md")
)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes from headings."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_files_and_targets_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    named = re.findall(r"\b((?:tests|docs|benchmarks|configs|salt_lightning)/[\w./-]+\.(?:py|md|yaml|png))\b", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
    links = [link.partition("#") for link in re.findall(r"\]\((?!http)([^)]+)\)", text)]
    to = [((ROOT / page).parent.joinpath(link) if link else ROOT / page, anchor) for link, _, anchor in links]
    assert [path for path, _ in to if not path.exists()] == []
    assert [(path, anchor) for path, anchor in to if anchor and anchor not in anchors(path)] == []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert [target for target in re.findall(r"`make ([\w-]+)`", text) if target not in targets] == []


def test_the_readme_is_short_and_starts_with_a_command():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert next(i for i, line in enumerate(lines) if line.startswith("```")) < 25


def test_means_and_spreads_in_the_results_follow_from_the_raw_values_beside_them():
    looked_at = 0
    for row in (ROOT / "RESULTS.md").read_text().replace("*", "").splitlines():
        cells = [cell.strip() for cell in row.split("|")]
        raw = next((cell for cell in cells if re.fullmatch(r"\d\.\d{4}(, \d\.\d{4}){2,}", cell)), None)
        told = next((cell for cell in cells if re.fullmatch(r"\d\.\d{4} \(\d\.\d{4}\)", cell)), None)
        if raw and told:
            values, (mean, std) = [float(x) for x in raw.split(", ")], [float(x.strip("()")) for x in told.split()]
            # the raw values and the printed ones are each rounded by up to half a digit
            assert abs(statistics.fmean(values) - mean) <= 1.01e-4, row
            assert abs(statistics.stdev(values) - std) <= 1.51e-4, row
            looked_at += 1
    assert looked_at > 25
