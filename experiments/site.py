"""The repository as a website that works from a folder, without network:  python -m experiments.site

Made of the scripts, tests and docs themselves. Needs the extra: pip install -e ".[site]"
"""

import json
import re
import shutil
import subprocess
from difflib import SequenceMatcher
from html import escape, unescape
from itertools import groupby, zip_longest
from pathlib import Path
from string import Template

import tyro
from latex2mathml.converter import convert
from markdown_it import MarkdownIt

from common.flags import ROOT
from experiments.annotate import BANNER, Script, coloured, linked, prose
from experiments.report import slug as github_slug

PARENTS = {"a2c_sync": None, "a3c_async": "a2c_sync", "off_policy_ac": "a2c_sync", "sac": "off_policy_ac"}
LOOK = Path(__file__).parent / "look"  # page.html, site.css, site.js, fonts


def slug(title: str) -> str:
    """An anchor: that of GitHub, but d11 for a decision."""
    title = unescape(re.sub("<.*?>", "", title)).strip()
    return m[0].lower() if (m := re.match(r"D\d+(?= )", title)) else github_slug(title)


def document(text: str) -> str:
    """A file of docs/ in HTML: headings have anchors, equations are MathML, and links to other files lead to pages."""
    text = re.sub(r"\$(\$?)([^$`]+)\$\1", lambda m: convert(m[2], display="block" if m[1] else "inline"), text)
    highlighted = {"html": True, "linkify": False, "highlight": lambda code, name, _: coloured(code, name or "text")}
    html = MarkdownIt("gfm-like", highlighted).render(text)
    html = re.sub(r"<pre><code[^>]*>(.*?)</code></pre>", r'<pre class="block">\1</pre>', html, flags=re.DOTALL)
    html = re.sub(r'href="(?:\.\./)?(\w+)\.py">([^<]*)\((\d+)\)</a>', r'href="\1.html#eq\3">\2(\3)</a>', html)
    html = re.sub(r'href="(?:docs/)?(a2c_sync|a3c_async|off_policy_ac|sac)\.md', r'href="\1-notes.html', html)
    html = re.sub(r'href="(?:\.\./)?(a2c_sync|a3c_async|off_policy_ac|sac)\.py"', r'href="\1.html"', html)
    html = re.sub(r'href="(?:claims\.md)?#[\w-]+-(?:d\d+|pitfalls)">([\w-]+)<', r'href="claim-\1.html">\1<', html)
    html = re.sub(r'href="(?:docs/)?(\w+)\.md', r'href="\1.html', html).replace('src="docs/', 'src="')
    html = re.sub(r'href="(?:\.\./)?((?:tests|examples|experiments)/[^"]+)"', r'href="files/\1"', html)
    html = re.sub(r"<h([23])>(.*?)</h", lambda h: f'<h{h[1]} id="{slug(h[2])}">{h[2]}</h', html)
    html = re.sub(r"<table>.*?</table>", r'<div class="wide">\g<0></div>', html, flags=re.DOTALL)
    html = re.sub(r"<td>(yes|no|open)((?:, fragile)?): ", r'<td><b class="badge \1">\1\2</b> ', html)
    return re.sub(r"\[-?[\d.,e+-]+, -?[\d.,e+-]+\](?=[^<]*</td>)", r'<span class="ci">\g<0></span>', html)


def in_sections(sections: dict[str, tuple[str, str]]) -> str:
    """From name -> count and content: links to all, and all; what comes before the first banner is closed at first."""
    links, html = "", ""
    for name, (count, content) in sections.items():
        title = f"<h2>{name} {count}</h2>"
        content = f"<details><summary>{title}</summary>{content}</details>" if "mports" in name else title + content
        links += f'<a href="#{slug(name)}">{name} {count}</a>'
        html += f'<section id="{slug(name)}">{content}</section>'
    return f'<nav class="sections">{links}</nav>{html}'


def annotated(script: Script, decisions: str, claims: list[dict]) -> str:
    """A script, beside the decisions that it is about, and what came out of the claims about these."""
    items, parent = "", PARENTS[script.name]
    links = f'<a href="diff-{script.name}.html">What changed since {parent}.py</a>' if parent else ""
    low, high = map(int, re.search(r"decisions D(\d+)(?:-D| and D)(\d+)", script.docstring).groups())
    for number, title in re.findall(r"^### D(\d+) (.*)", decisions, re.MULTILINE)[low - 1 : high]:
        about = " ".join(badge(claim) + dots(claim) for claim in claims if cites(claim["decisions"], number))
        items += f'<li><a href="decisions.html#d{number}"><b>D{number}</b> {title}</a> {about}</li>'
    sections = {}
    for name, rows in script.sections.items():
        count = f"<small>{sum(len(lines) for _, lines in rows)}</small>"
        sections[name] = count, "".join(script.row(*row) for row in rows)
    return (
        f'<header class="script"><h1>{script.name}.py</h1><p class="chips">{links}<a href="{script.name}-notes.html">'
        f'Metrics, details, choices</a></p>{script.head()}</header><aside class="card"><h3>The lecture\'s decisions '
        f"here</h3><ul>{items}</ul></aside>{in_sections(sections)}"
    )


def differing(*lines: str) -> tuple[list, list]:
    """Of two lines that are alike, where their words differ: (begin, end) each."""
    words, found = [re.findall(r"\w+|\s+|.", line) for line in lines], ([], [])
    matcher = SequenceMatcher(None, *words, autojunk=False)
    for kind, *ends in matcher.get_opcodes() if matcher.ratio() > 0.5 else ():
        for spans, side, (begin, end) in zip(found, words, (ends[:2], ends[2:])):
            spans += [(len("".join(side[:begin])), len("".join(side[:end])))] * (kind != "equal")
    return found


def marked(html: str, spans: list) -> str:
    """A coloured line with these characters of its text highlighted."""
    parts, at = re.findall(r"<[^>]+>|&#?\w+;|.", html), 0
    for i, part in enumerate(parts):
        if part[0] != "<":
            parts[i] = f"<mark>{part}</mark>" if any(begin <= at < end for begin, end in spans) else part
            at += 1
    return "".join(parts).replace("</mark><mark>", "")


def paired(gone: list, new: list, *texts) -> list[tuple]:
    """Flags and functions of the same name side by side, and the other lines in their order between these."""
    named, pairs, done = r"^    \w+: |(?:def|class) \w+", [], (0, 0)
    keys = [[m[0] if (m := re.search(named, line)) else object() for line in lines] for lines in texts]
    for i, j, size in SequenceMatcher(None, *keys, autojunk=False).get_matching_blocks():
        pairs += [*zip_longest(gone[done[0] : i], new[done[1] : j]), *zip(gone[i : i + size], new[j : j + size])]
        done = i + size, j + size
    return pairs


def cells(parent: Script, child: Script, pairs) -> str:
    """Lines of both, side by side; from pairs of (sign, line number)."""
    html, scripts = "", (parent, child)
    for pair in pairs:
        texts = [script.lines[n - 1] for script, (sign, n) in zip(scripts, pair) if sign != " "] if all(pair) else []
        changed = differing(*texts) if texts else ([], [])
        for side, script, cell, spans in zip("lr", scripts, pair, changed):
            sign, n = cell or ("none", 0)
            content = f'<a href="{script.link(n)}">{n}</a>{marked(script.coloured[n - 1], spans)}' if n else ""
            kind = {" ": "same" if script.lines[n - 1] else "same blank", "-": "del", "+": "add"}.get(sign, sign)
            html += f'<pre class="{side} {kind}">{content}</pre>'
    return f'<div class="g">{html}</div>' if html else ""


def folded(parent: Script, child: Script, pairs, what: str) -> str:
    """Lines behind a title, which names the functions and classes in them."""
    lines = ((child if new else parent).lines[(new or old)[1] - 1] for old, new in pairs)
    found = (re.match(r"(?:def|class) (\w+)", line) for line in lines)
    names = ", ".join(m[1] for m in found if m)
    title = f"{len(pairs)} {what} lines" + f": <code>{names}</code>" * bool(names)
    return f"<details><summary>{title}</summary>{cells(parent, child, pairs)}</details>"


def difference(parent: Script, child: Script) -> str:
    """Side by side, by section; folded what did not change, but for the lines around a change."""
    command = f"git diff --no-index --no-color --no-ext-diff -w --histogram -U9999 {parent.name}.py {child.name}.py"
    text = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True).stdout
    found, left, right = {"Docstring, imports": []}, 0, 0
    for line in text[text.index("\n@@") :].splitlines()[2:]:
        if banner := re.match(rf".{BANNER}", line):
            found[banner[1]] = found.get(banner[1], [])
        left, right = left + (line[0] != "+"), right + (line[0] != "-")
        lines = [*found.values()][-1]
        if lines or line.strip() and not (banner and line[0] == " "):  # neither the banner nor the lines below it
            lines.append((line[0], left, right))
    sections, total = {}, {sign: sum(line[0] == sign for lines in found.values() for line in lines) for sign in "+-"}
    for name, lines in found.items():
        html, groups = "", [(same, [*group]) for same, group in groupby(lines, lambda line: line[0] == " ")]
        for i, (same, group) in enumerate(groups):
            if same:
                pairs = [((" ", left), (" ", right)) for _, left, right in group]
                first, last = 3 * (i > 0), len(pairs) - 3 * (i < len(groups) - 1)
                first, last = (first, last) if last - first > 3 else (0, 0)
                html += cells(parent, child, pairs[:first])
                html += folded(parent, child, pairs[first:last], "unchanged") if last else ""
                html += cells(parent, child, pairs[last:])
            else:
                gone = [(sign, left) for sign, left, _ in group if sign == "-"]
                new = [(sign, right) for sign, _, right in group if sign == "+"]
                pairs = paired(gone, new, *([s.lines[n - 1] for _, n in g] for s, g in ((parent, gone), (child, new))))
                few = new or len(gone) < 8
                html += cells(parent, child, pairs) if few else folded(parent, child, pairs, "removed")
        more, less = (sum(sign == s for sign, *_ in lines) for s in "+-")
        count = f"<ins>+{more}</ins> <del>−{less}</del>" if more + less else "unchanged"
        sections[name] = f"<small>{count}</small>", html
    about = prose(re.search(r"Against .*?\n\n(?= +\(1\))", child.docstring, re.DOTALL)[0])
    title = " → ".join(f'<a href="{script.name}.html">{script.name}.py</a>' for script in (parent, child))
    about += f"<p>{total['+']} lines are new, {total['-']} gone; a change of indentation is none.</p>"
    return f'<header class="script"><h1>{title}</h1>{about}</header><div class="diff">{in_sections(sections)}</div>'


def claims_of(text: str) -> list[dict]:
    """The sections of claims.md that were run, each with its row of the table at the top."""
    claims = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        if found := re.search(r"^<!-- end of ([\w-]+) -->", section, re.MULTILINE):
            cells = re.search(rf"^\| \[{found[1]}\]\(.*?\) \| (.*) \|$", text, re.MULTILINE)[1].split(" | ")
            claim = dict(zip(("finding", "counts", "seeds", "minutes"), cells)) | {"name": found[1], "text": section}
            claim["title"], claim["decisions"] = re.match(r"(.*) \((.*)\)", section).groups()
            claims.append(claim | {"finding": MarkdownIt().renderInline(claim["finding"])})
    return claims


def cites(text: str, number: str) -> bool:
    return bool(re.search(rf"(?<!beyond )\bD{number}[ab]?\b(?<!to D{number})", text))


def dots(claim: dict) -> str:
    """A dot for each answer; fragile ones are hollow."""
    html = ""
    for number, word, fragile in re.findall(r"(\d+) (yes|no|open)(?: \((\d+) fragile)?", claim["counts"]):
        html += "".join(f'<i class="{word}{" fragile" * (i < int(fragile or 0))}"></i>' for i in range(int(number)))
    return f'<span class="answers" title="{claim["counts"]}">{html}</span>'


def badge(claim: dict) -> str:
    return f'<a class="badge" href="claim-{claim["name"]}.html" title="{escape(claim["title"])}">{claim["name"]}</a>'


def dashboard(claims: list[dict], intro: str, rest: str) -> str:
    """A row for each claim; then how to read them."""
    html = f'<h1>The lecture\'s claims, run</h1>{intro}<p>A square is an answer: <b class="badge yes">yes</b> <b '
    html += 'class="badge no">no</b> <b class="badge open">open</b>; hollow if fragile.</p><div class="claims">'
    for c in claims:
        html += (
            f'<article><a class="thumb" href="claim-{c["name"]}.html"><img src="figures/claim_{c["name"]}.png" '
            f'loading="lazy" alt="{c["name"]}"></a><div><h3><a href="claim-{c["name"]}.html">{escape(c["title"])}</a>'
            f'</h3><p>{c["finding"]}</p></div><div class="facts">{dots(c)}<span>{c["counts"]}</span><span>'
            f"{linked(c['decisions'])}</span><span>Seeds: {c['seeds']}; minutes: {c['minutes']}</span></div></article>"
        )
    return f"{html}</div>{rest}"


def decisions_table(text: str, scripts: list[Script], claims: list[dict]) -> str:
    """For each decision the lines that cite it, its claims, and the tests whose docstrings name it."""
    files, test = sorted((ROOT / "tests").glob("test_*.py")), r'^def (test_\w+)\([^)]*\):\n    """([^"]*)"""'
    tests = [(path.name, *found) for path in files for found in re.findall(test, path.read_text(), re.MULTILINE)]
    html = '<div class="wide"><table class="decisions"><tr><th>Decision<th>In the code<th>Claims<th>Tests</tr>'
    for number, title in re.findall(r"^### D(\d+) (.*)", text, re.MULTILINE):
        code = ""
        for script in scripts:
            lines = {script.beside.get(n, n) for n, line in enumerate(script.lines, 1) if cites(line, number)}
            links = ", ".join(f'<a href="{script.name}.html#L{n}">{n}</a>' for n in sorted(lines) if n > script.begin)
            code += f"<div><code>{script.name}.py</code> {links}</div>" if links else ""
        about = " ".join(badge(claim) for claim in claims if cites(claim["decisions"], number))
        found = ((file, name) for file, name, docstring in tests if cites(docstring, number))
        proofs = "<br>".join(f'<a href="files/tests/{file}"><code>{name}</code></a>' for file, name in found)
        html += f'<tr><th><a href="#d{number}">D{number} {title}</a><td>{code}<td>{about}<td>{proofs}</tr>'
    return html + "</table></div>"


def pages() -> dict[str, tuple[str, str, str]]:
    """Name -> title, layout, content."""
    scripts = {name: Script(name) for name in PARENTS}
    docs = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
    claims, parts = claims_of(docs["claims"]), re.split(r"^(?=## )", docs["claims"], flags=re.MULTILINE)
    readme = (ROOT / "README.md").read_text() + "\n[All links that leave these pages](links.html)\n"
    made = {"index": ("Actor-critic", "doc", document(readme))}
    for name, script in scripts.items():
        made[name] = f"{name}.py", "code", annotated(script, docs["decisions"], claims)
        made[f"{name}-notes"] = f"{name}.py: notes", "doc", linked(document(docs.pop(name)))
        if parent := PARENTS[name]:
            made[f"diff-{name}"] = f"{parent}.py → {name}.py", "code", difference(scripts[parent], script)
    for claim in claims:
        head = f'<p class="chips"><a href="claims.html">All claims</a>{dots(claim)}<span>{linked(claim["decisions"])}'
        head += f'</span></p><h1>{escape(claim["title"])}</h1><p class="lead">{claim["finding"]}</p>'
        html = head + linked(document(claim["text"].partition("\n")[2]))
        made[f"claim-{claim['name']}"] = claim["title"], "doc board claim", html
    made |= {name: (re.match("# (.*)", text)[1], "doc", linked(document(text))) for name, text in docs.items()}
    made["results"] = made["results"][0], "doc board", made["results"][2]
    intro = re.sub(r"<!-- overview.*", "", parts[0].partition("\n")[2], flags=re.DOTALL)
    rest = document("".join(part for part in parts[1:] if "<!-- end of" not in part))
    made["claims"] = "Claims", "doc board", dashboard(claims, document(intro), rest)
    table = decisions_table(docs["decisions"], [*scripts.values()], claims)
    html = re.sub(r'<div class="wide">.*?</div>', lambda _: table, made["decisions"][2], count=1, flags=re.DOTALL)
    return made | {"decisions": ("Decisions", "doc board", html)}


def main(out: Path = Path("site")):
    template, index, made = Template((LOOK / "page.html").read_text()), [], pages()
    shutil.copytree(ROOT / "docs" / "figures", out / "figures", dirs_exist_ok=True)
    shutil.copytree(LOOK, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("page.html"))
    everything = "".join(html for *_, html in made.values())
    links = (f'<li><a href="{link}">{link}</a>' for link in sorted({*re.findall('href="(https?:[^"]+)"', everything)}))
    made["links"] = "Links", "doc", f"<h1>All links that leave these pages</h1><ul>{''.join(links)}</ul>"
    for name in {*re.findall('href="files/([^"#]+)"', everything)}:
        (out / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, out / "files" / name)
    for name, (title, layout, html) in made.items():
        toc = re.findall(r'<h2 id="(.*?)">(.*?)</h2>', html) if layout == "doc" else []
        toc = "".join(f'<a href="#{anchor}">{re.sub("<.*?>", "", heading)}</a>' for anchor, heading in toc)
        page = template.substitute(title=escape(title), layout=layout, content=html, toc=toc)
        (out / f"{name}.html").write_text(page)
        for part in re.split(r'(?=<h[23] id=|<section id=|<div class="row top")', html):
            anchor = f"#{m[1]}" if (m := re.search(r'id="([^"]+)"', part)) else ""
            words = unescape(re.sub("<[^>]*>", " ", part)).split()
            index.append([title, f"{name}.html{anchor}", " ".join(words)])
    (out / "search.js").write_text(f"INDEX = {json.dumps(index, ensure_ascii=False)}")
    print(f"{len(made)} pages: {(out / 'index.html').resolve()}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
