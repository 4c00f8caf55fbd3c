"""The stated size is held: SPEC 7's wall, no long function, no long line."""

import ast
import io
import tokenize
from pathlib import Path

import inbound

SOURCE = Path(inbound.__file__).read_text(encoding="utf-8")
WALL, LONGEST = 1200, 60


def docstring_lines(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            yield from range(node.body[0].lineno, node.body[0].end_lineno + 1)


def code_lines(source):
    """Numbers of the lines that hold code: docstrings, comments and blank lines do not count."""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - set(docstring_lines(ast.parse(source)))


def functions(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def test_the_counter_counts_code_and_nothing_else():
    source = ('"""doc\nstring"""\n\n# comment\na = (1,\n     2)\n'
              'def f():\n    """doc"""\n    return """x\ny"""\n')
    assert code_lines(source) == {5, 6, 7, 9, 10}


def test_inbound_py_stays_below_its_wall():
    assert len(code_lines(SOURCE)) <= WALL


def test_no_function_is_longer_than_a_screen():
    assert {name: length for name, length in functions(SOURCE) if length > LONGEST} == {}


def test_no_line_is_wider_than_the_page():
    pages = {inbound.__file__: 100, Path(inbound.__file__).with_name("schema.sql"): 118}
    pages |= {file: 110 for file in Path(__file__).parent.glob("*.py")}
    wide = [(Path(file).name, number) for file, columns in pages.items()
            for number, line in enumerate(Path(file).read_text("utf-8").splitlines(), 1)
            if len(line) > columns]
    assert wide == []


if __name__ == "__main__":
    longest = max(functions(SOURCE), key=lambda item: item[1])
    print(f"{len(code_lines(SOURCE))} lines of code; longest function: {longest[0]}, {longest[1]} lines")
