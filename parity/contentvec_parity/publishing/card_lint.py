"""What the generator of a model card cannot guarantee: that the Hub takes it, and its links.

That a card says what was measured is proven by rendering it again from the
evidence (``package.open_package``); nothing here reads its figures.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator

#: license identifiers that the Hub knows, as far as a speech model may have one
LICENSES = (
    "mit",
    "apache-2.0",
    "bsd",
    "bsd-2-clause",
    "bsd-3-clause",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0",
    "gpl-3.0",
    "lgpl-3.0",
    "agpl-3.0",
    "mpl-2.0",
    "openrail",
    "unknown",
)
#: tasks that the Hub offers for models that take audio
PIPELINE_TAGS = frozenset(
    {
        "feature-extraction",
        "audio-to-audio",
        "audio-classification",
        "automatic-speech-recognition",
        "voice-activity-detection",
    }
)
#: keys of a model card's front matter that this project writes or may be given
FRONT_MATTER = {
    "license": str,
    "library_name": str,
    "pipeline_tag": str,
    "base_model": str,
    "tags": list,
    "language": list,
    "datasets": list,
}
_REQUIRED = ("license", "library_name", "pipeline_tag", "tags")


def lint(text: str, files: Collection[str]) -> list[str]:
    """What is wrong with ``text`` as a card beside ``files``; nothing, if all is right."""
    front, body = _split(text)
    if front is None:
        return ["it does not begin with front matter between two lines of ---"]
    return [*_lint_front_matter(front), *_lint_links(body, files), *_lint_code(body)]


def _split(text: str) -> tuple[str | None, str]:
    match = re.match(r"---\n(.*?)\n---\n", text, re.S)
    return (match[1], text[match.end() :]) if match else (None, text)


def _lint_front_matter(front: str) -> Iterator[str]:
    import yaml  # type: ignore[import-untyped]

    try:
        fields = yaml.safe_load(front)
    except yaml.YAMLError as error:
        yield f"the front matter is not YAML: {error}"
        return
    if not isinstance(fields, dict):
        yield "the front matter is not a mapping"
        return
    for key in _REQUIRED:
        if key not in fields:
            yield f"the front matter has no {key}"
    for key, value in fields.items():
        if key not in FRONT_MATTER:
            yield f"the front matter's {key} means nothing to the Hub"
        elif not isinstance(value, FRONT_MATTER[key]):
            yield f"the front matter's {key} must be a {FRONT_MATTER[key].__name__}: {value!r}"
    license_id, task = fields.get("license"), fields.get("pipeline_tag")
    if license_id not in LICENSES:
        yield f"the Hub knows no license {license_id!r}"
    if task not in PIPELINE_TAGS:
        yield f"the Hub has no task {task!r} for audio models"
    if fields.get("library_name") != "mlx":
        yield "library_name must be mlx, or the Hub does not know what loads it"
    base = fields.get("base_model")
    if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)):
        yield f"base_model must be a repository like owner/name: {base!r}"
    tags = fields.get("tags") or []
    wrong = [
        tag for tag in tags if not isinstance(tag, str) or not re.fullmatch(r"[a-z0-9-]+", tag)
    ]
    yield from (f"a tag must be lower-case words joined by hyphens: {tag!r}" for tag in wrong)


_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def _lint_links(body: str, files: Collection[str]) -> Iterator[str]:
    text = _FENCED.sub("", body)
    anchors = {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in _LINK.findall(text):
        if target.startswith("#"):
            if target[1:] not in anchors:
                yield f"the link {target} leads to no heading"
        elif "://" in target:
            if not re.fullmatch(r"https://[\w.-]+\.[a-z]{2,}(/[\w./~%+-]*)?", target):
                yield f"the link {target} is not a plain https address"
        elif target not in files:
            yield f"the link {target} leads to no file of the package"


def _lint_code(body: str) -> Iterator[str]:
    """Blocks of Python that do not parse."""
    for language, code in _FENCED.findall(body):
        if language == "python":
            try:
                ast.parse(code)
            except SyntaxError as error:
                yield f"a block of Python does not parse: {error.msg}: {error.text or ''}".rstrip()
