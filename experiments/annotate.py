"""A script as notes beside code; its equations become LaTeX and MathML. The pages are made by experiments.site."""

import ast
import re
import unicodedata
from itertools import groupby

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

from common.flags import ROOT

BANNER, TAG, EQUATION = r"# --- (\w+) -+$", r"# \((\d+)\)$", r" +\((\d+)\) +(.+)"
TEX = [  # in this order: what the equations have beyond LaTeX, and its command
    (r"([^\W\d_])\u0302", r"\\hat{\1}"), (r"([^\W\d_])\u0304", r"\\bar{\1}"), ("=\u0338", r"\\neq "),
    ("½ ?", r"\\tfrac12\\,"), ("ε", r"\\varepsilon "), ("φ", r"\\varphi "),
    (r"(?<!= )(?<!\()−", "-"), ("−", r"\\text{−}"), (",  ", r",\\quad "), ("·", r"\\text{·}"), ("²", "^2"),
    ("←", r"\\leftarrow "), ("Σ", r"\\sum"), (" ~ ", r"\\;\\sim\\;"), (r"\.\.\.", r",\\ldots,"), (r"\|", r"\\mid "),
    (r"\b([HN])\(", r"\\mathcal{\1}("), (r"\b1/\((.+?)\)", r"\\frac{1}{\1}"),
    (r"(π_\w+\([^()]+\)) / (π_\w+\([^()]+\))", r"\\frac{\1}{\2}"),
    (r"(?<=[\w)}\]]) (?=(?:log|mean|min|max|tanh)\b)", r"\\,"), (r"\b(log|mean|min|tanh|dim)((?:_\S+)?) ", r"\1\2\\,"),
    (r"_(\w\w+)", r"_{\1}"), (r"(?<![\\A-Za-z])([A-Za-z]{2,})", r"\\text{\1}"),
]  # fmt: skip


def tex(equation: str) -> str:
    """LaTeX of an equation in Unicode."""
    equation = unicodedata.normalize("NFD", equation)
    for pattern, command in TEX:
        equation = re.sub(pattern, command, equation)
    named = re.sub("[α-ω]", lambda letter: f"\\{unicodedata.name(letter[0]).split()[-1].lower()} ", equation)
    return named.replace("lamda", "lambda")


def math(equation: str) -> str:
    """MathML; what stands behind three spaces is a remark."""
    first, *rest = (convert(tex(part)) for part in re.split(" {3,}", equation))
    return f'<span class="math">{first}</span>' + "".join(f'<span class="aside">{part}</span>' for part in rest)


def linked(html: str) -> str:
    """Decisions and papers become links."""
    html = re.sub(
        r"\bD(1?\d)(?=[ab]?\b)(?![^<]*(?:</a>|</h\d>|>))", r'<a class="d" href="decisions.html#d\1">D\1</a>', html
    )
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>', html)


def prose(text: str) -> str:
    """A comment or docstring: Markdown, in which flags are code."""
    text = re.sub(r"^(?! )(.+)\n(?= {4})", r"\1\n\n", text, flags=re.MULTILINE)
    parts = re.split("(`[^`]*`|^ {4}.*$)", text, flags=re.MULTILINE)
    parts[::2] = [re.sub(r"(?<![\w-])--[a-z][a-z-]+", r"`\g<0>`", part) for part in parts[::2]]
    return linked(MarkdownIt().render("".join(parts)))


def coloured(text: str, language: str = "python") -> str:
    return highlight(text, get_lexer_by_name(language), HtmlFormatter(nowrap=True, stripnl=False))


class Script:
    """A script in sections, each in rows: notes, and the numbers of the lines that they stand beside."""

    def __init__(self, name: str):
        self.name, text = name, (ROOT / f"{name}.py").read_text()
        self.lines, self.coloured, tree = text.splitlines(), coloured(text).splitlines(), ast.parse(text)
        self.docstring, self.begin = ast.get_docstring(tree, clean=False), tree.body[0].end_lineno + 1
        self.equations = dict(re.findall(rf"^{EQUATION}", self.docstring, re.MULTILINE))
        self.tags = {n: m[1] for n, line in enumerate(self.lines, 1) if (m := re.search(TAG, line))}
        self.notes, self.beside = {}, {}  # line -> its docstring; line of a docstring or comment -> line it is about
        for node in ast.walk(tree):
            body = [node, *node.body] if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else []
            for owner, string in zip(body, body[1:]):
                if isinstance(string, ast.Expr) and isinstance(getattr(string.value, "value", None), str):
                    top = min([owner.lineno, *(each.lineno for each in getattr(owner, "decorator_list", []))])
                    self.notes[top] = "\n".join(line.strip() for line in string.value.value.splitlines())
                    self.beside |= dict.fromkeys(range(string.lineno, string.end_lineno + 1), top)
        self.sections = self.cut(docstrings=set(self.beside))

    def cut(self, docstrings: set[int]) -> dict[str, list]:
        sections = {"Imports": (rows := [([], [])])}
        above, comment = "", []
        for n, line in enumerate(map(str.strip, self.lines[self.begin - 1 :]), self.begin):
            if banner := re.match(BANNER, line):
                sections[banner[1]] = rows = [([], [])]
            elif n in docstrings:
                continue
            elif line.startswith("# "):
                if not comment:
                    rows.append(([], []))
                rows[-1][0].append(line[2:])
                comment.append(n)
            else:
                starts = re.match("def |class |@", self.lines[n - 1]) and not above.startswith("@")
                if starts or n in self.notes or n - 1 in self.tags:
                    rows.append(([], []))
                rows[-1][0].extend([self.notes[n]] if n in self.notes else [])
                rows[-1][1].append(n)
                self.beside |= dict.fromkeys(comment, n)
                above, comment = line, []
        for _, numbers in (row for rows in sections.values() for row in rows):
            while numbers and not "".join(self.lines[n - 1] for n in numbers[-2:]):  # blank lines between functions
                del numbers[-2:]
        return sections

    def link(self, n: int) -> str:
        """Where line n is on the page; the line beside which it stands, if it is of a docstring or comment."""
        n = self.beside.get(n, n)
        shown = any(n in numbers for rows in self.sections.values() for _, numbers in rows)
        return f"{self.name}.html" + f"#L{n}" * shown

    def equation(self, number: str, id: str = "", where: str = "") -> str:
        shown = f'<a class="no" href="#eq{number}">({number})</a>{math(self.equations[number])}'
        return f'<div class="eq"{id}>{shown}{where}</div>'

    def row(self, notes: list[str], numbers: list[int]) -> str:
        code = [self.coloured[n - 1] for n in numbers]
        code = [re.sub(r"# \((\d+)\)</span>$", r'# <a class="tag" href="#eq\1">(\1)</a></span>', line) for line in code]
        code = [re.sub(r'<span class="c1">.*?</span>', lambda comment: linked(comment[0]), line) for line in code]
        code = [
            f'<span class="l{" tagged" * (n in self.tags)}" id="L{n}"><a href="#L{n}">{n}</a>{line}\n</span>'
            for n, line in zip(numbers, code)
        ]
        note = prose("\n".join(notes))
        if numbers and numbers[0] not in self.notes:  # a comment, of one word if it names a step of the update
            note = re.sub(r"^<p>(\w+)(?=</p>|: )", r"<p><b>\1</b>", note)
        note += "".join(self.equation(self.tags[n]) for n in numbers if n in self.tags)
        top = " top" * bool(numbers and re.match("def |class |@", self.lines[numbers[0] - 1]))
        return f'<div class="row{top}"><div class="note">{note}</div><pre>{"".join(code)}</pre></div>' * bool(code)

    def head(self) -> str:
        """The docstring, in which equations have links to the lines that compute them."""
        html = ""
        for is_equation, lines in groupby(self.docstring.splitlines(), lambda line: bool(re.match(EQUATION, line))):
            if not is_equation:
                html += prose("\n".join(lines))
                continue
            html += '<div class="equations">'
            for number in (re.match(EQUATION, line)[1] for line in lines):
                where = " ".join(f'<a href="#L{n}">line {n}</a>' for n, tag in self.tags.items() if tag == number)
                html += self.equation(number, f' id="eq{number}"', f'<span class="where">{where}</span>')
            html += "</div>"
        return html.replace("<p>", '<p class="lead">', 1)
