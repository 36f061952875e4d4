"""XMP packets: the XML in image files that says where they come from (ISO 16684-1)."""

from __future__ import annotations

import re
from xml.etree import ElementTree
from xml.sax.saxutils import escape

__all__ = ["fields_of", "packet"]

# IPTC's terms for a generated image, and for one generated from another image (cv.iptc.org/newscodes).
SOURCES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
GENERATED, COMPOSED = f"{SOURCES}trainedAlgorithmicMedia", f"{SOURCES}compositeWithTrainedAlgorithmicMedia"
NAMESPACES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "dc": "http://purl.org/dc/elements/1.1/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "sfumato": "urn:sfumato:1",
}
# Characters that XML cannot contain, even escaped.
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def packet(prompt: str, *, composed: bool, version: str = "", recipe: str | None = None) -> str:
    """Return a packet that marks an image as generated, or as composed with a generated one. recipe: ASCII JSON."""
    names = " ".join(f'xmlns:{name}="{uri}"' for name, uri in NAMESPACES.items())
    described = escape(NOT_XML.sub(" ", prompt))
    own = "" if recipe is None else f"<sfumato:recipe>{escape(recipe)}</sfumato:recipe>"
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF {names}><rdf:Description rdf:about="">'
        f"<xmp:CreatorTool>{f'Sfumato {version}'.strip()}</xmp:CreatorTool>"
        f"<Iptc4xmpExt:DigitalSourceType>{COMPOSED if composed else GENERATED}</Iptc4xmpExt:DigitalSourceType>"
        f'<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{described}</rdf:li></rdf:Alt></dc:description>'
        f'{own}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )


def fields_of(text: str) -> dict[str, str]:
    """Return the properties of a packet by their names without namespaces; empty if the text is not a packet.

    A packet that declares entities is ignored, because they can expand without limit or refer to files.
    """
    begin, end = text.find("<x:xmpmeta"), text.rfind("</x:xmpmeta>")
    if begin < 0 or end < 0 or "<!" in text:
        return {}
    try:
        root = ElementTree.fromstring(text[begin : end + len("</x:xmpmeta>")])
    except ElementTree.ParseError:
        return {}
    found: dict[str, str] = {}
    for description in root.iter(f"{{{NAMESPACES['rdf']}}}Description"):
        found |= {_local(name): value for name, value in description.attrib.items()}
        found |= {_local(one.tag): "".join(one.itertext()).strip() for one in description}
    return found


def _local(name: str) -> str:
    return name.rpartition("}")[2]
