"""mkdocs hooks: pages from the repository's root, linked files outside docs/, equations and tables of options.

README.md is the home page and CHANGELOG.md is a page, so neither is duplicated. Links to files of the repository work
unchanged on GitHub; on the site, the file is copied next to the pages, and a link to a folder becomes plain text. Equations
become MathML at build time, so the site needs no scripts or servers. `<!-- options of FILE CLASS -->` becomes a table of
that config's options.
"""

import ast
import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}
MATH = {
    r'<span class="arithmatex">\\\((.*?)\\\)</span>': "inline",
    r'<div class="arithmatex">\\\[(.*?)\\\]</div>': "block",
}
LINK = re.compile(r"(\]\(|(?:src|srcset|href)=\")([^)\"#\s]+)")


def on_files(files, config):
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page in [file for file in files if file.src_uri.endswith(".md")]:
        for target in map(_repository_path(page.src_uri), LINK.findall(page.content_string)):
            if (
                target
                and not target.endswith(".md")
                and (ROOT / target).is_file()
                and files.get_file_from_path(target) is None
            ):
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown, page, config, files):
    def link(match):
        opening, target = match.groups()
        path = _repository_path(page.file.src_uri)((opening, target))
        if path is None:
            return match[0]
        own = next((own for own, source in PAGES.items() if source == path), path)
        return opening + posixpath.relpath(own, posixpath.dirname(page.file.src_uri) or ".")

    markdown = re.sub(r"<!-- options of (\S+) (\w+) -->", _options, markdown)
    markdown = re.sub(r"\[([^\]]*)\]\(([^)#\s]+)\)", lambda m: m[1] if _is_folder(page, m[2]) else m[0], markdown)
    return LINK.sub(link, markdown)


def on_page_content(content, page, config, files):
    for pattern, display in MATH.items():
        content = re.sub(pattern, lambda m, display=display: _mathml(m[1], display), content, flags=re.DOTALL)
    return content


def _mathml(latex: str, display: str) -> str:
    mathml = convert(html.unescape(latex).strip(), display=display)
    mathml = re.sub(r"(<mi>(?:log|tanh)</mi>)(?=<m)", r'\1<mspace width="0.17em"/>', mathml)
    return f'<div class="equation">{mathml}</div>' if display == "block" else mathml  # scrolls on a phone


def _options(match) -> str:
    """A config class's options as a table, read from its source, which also has their help texts."""
    path, name = match.groups()
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    lines = ["| option | default | |", "|---|---|---|"]
    for field in body:
        if isinstance(field, ast.AnnAssign) and ast.unparse(field.value.func) == "_option":
            default, about = field.value.args
            parts = about.values if isinstance(about, ast.JoinedStr) else [about]
            text = "".join(part.value if isinstance(part, ast.Constant) else "…" for part in parts).replace("|", "\\|")
            lines.append(f"| `{field.target.id}` | `{ast.unparse(default)}` | {text} |")
    return "\n".join(lines)


def _repository_path(page: str):
    """Return a function from a match of LINK to a path in the repository, or None if mkdocs resolves the link itself."""
    source = PAGES.get(page)

    def path(match) -> str | None:
        target = match[1]
        if re.match(r"[a-z]+:|/|#", target):
            return None
        if source:  # as seen from the root
            inside = posixpath.normpath(target)
            return inside.removeprefix("docs/")
        outside = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
        return None if outside.startswith("docs/") else outside

    return path


def _is_folder(page, target: str) -> bool:
    path = _repository_path(page.file.src_uri)(("", target))
    return path is not None and (ROOT / path).is_dir()
