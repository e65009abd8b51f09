# SPDX-License-Identifier: Apache-2.0
"""Facts for the package builds: dependencies by Debian suite, and bills of materials. Run by tools/build-*.

    /usr/bin/python3 tools/packages.py depends            # one line each: DEBIAN-PACKAGE VERSION, or - NAME to bundle
    /usr/bin/python3 tools/packages.py sbom FILE [deb]    # CycloneDX 1.5 of a built file, on stdout
    /usr/bin/python3 tools/packages.py spec               # the RPM package's spec, dated SOURCE_DATE_EPOCH

In: pyproject.toml, and for `deb` the suite's package index. Needs only the standard library. The output depends on
nothing else, so two builds agree.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import tomllib
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = (ROOT / "ebpf_mig/__init__.py").read_text().partition('__version__ = "')[2].partition('"')[0]


def requirements() -> dict[str, str]:
    """Lower bounds of the Python dependencies, by name."""
    return dict(line.split(">=") for line in PROJECT["dependencies"])


def debian_name(name: str) -> str:
    return f"python3-{name.replace('.', '-').lower()}"


def candidate(package: str) -> str:
    """The version that apt would install; empty if there is none."""
    said = subprocess.run(["apt-cache", "policy", package], capture_output=True, text=True, check=True).stdout
    found = re.search(r"^  Candidate: (\S+)$", said, re.MULTILINE)
    return found[1] if found and found[1] != "(none)" else ""


def is_new_enough(version: str, bound: str) -> bool:
    command = ["dpkg", "--compare-versions", version, "ge", bound]
    return bool(version) and subprocess.run(command, check=False).returncode == 0


def bundled() -> dict[str, tuple[str, str]]:
    """(version, SHA-256) of the libraries that can be bundled, by name."""
    text = (ROOT / "deploy/debian/bundled.txt").read_text()
    rows = re.findall(r"^([\w.-]+)==(\S+) --hash=sha256:(\w+)$", text, re.MULTILINE)
    return {name: (version, digest) for name, version, digest in rows}


def depends() -> list[str]:
    """`PACKAGE BOUND` for each dependency that the suite has new enough; `- NAME` for one that must be bundled."""
    lines = []
    for name, bound in requirements().items():
        suite_has_it = is_new_enough(candidate(debian_name(name)), bound)
        if not suite_has_it and name not in bundled():
            sys.exit(
                f"this suite has no {debian_name(name)} {bound}, and deploy/debian/bundled.txt does not name {name}"
            )
        lines.append(f"{debian_name(name)} {bound}" if suite_has_it else f"- {name}")
    return lines


def component(name: str, purl: str, **more: Any) -> dict[str, Any]:
    return {"type": "library", "bom-ref": purl, "name": name, "purl": purl, **more}


def components(*, deb: bool) -> list[dict[str, Any]]:
    """The dependencies: Debian's packages or bundled libraries of a .deb, else the requirements of a wheel."""
    found = []
    for name, bound in requirements().items():
        package = debian_name(name)
        version = candidate(package) if deb else ""
        if is_new_enough(version, bound):
            found.append(component(package, f"pkg:deb/debian/{package}@{version}", version=version))
        elif deb:
            version, digest = bundled()[name]
            hashes = [{"alg": "SHA-256", "content": digest}]
            found.append(component(name, f"pkg:pypi/{name}@{version}", version=version, hashes=hashes))
        else:
            needs = [{"name": "ebpf-mig:requirement", "value": f">={bound}"}]
            found.append(component(name, f"pkg:pypi/{name}", properties=needs))
    if deb:
        version = candidate("python3-bpfcc")
        found.append(component("python3-bpfcc", f"pkg:deb/debian/python3-bpfcc@{version}", version=version))
    return found


def sbom(path: Path, *, deb: bool) -> dict[str, Any]:
    """The CycloneDX document of a built file."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    parts = components(deb=deb)
    kind = "deb/debian" if deb else "pypi"
    ours = {
        "type": "application",
        "bom-ref": path.name,
        "name": "ebpf-mig",
        "version": VERSION,
        "description": PROJECT["description"],
        "hashes": [{"alg": "SHA-256", "content": digest}],
        "licenses": [{"expression": PROJECT["license"]}],
        "purl": f"pkg:{kind}/ebpf-mig@{VERSION}",
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, digest)}",
        "version": 1,
        "metadata": {"component": ours},
        "components": parts,
        "dependencies": [{"ref": path.name, "dependsOn": sorted(part["bom-ref"] for part in parts)}],
    }


def spec() -> str:
    """deploy/rpm/ebpf-mig.spec.in, filled in. Any Fedora package of a Python library provides `python3dist(NAME)`."""
    needs = [f"python3dist({name.replace('.', '-').lower()}) >= {bound}" for name, bound in requirements().items()]
    build = ["python3dist(pip)", "python3dist(setuptools) >= 77", *needs]
    values = {
        "VERSION": VERSION,
        "DATE": time.strftime("%a %b %d %Y", time.gmtime(int(os.environ["SOURCE_DATE_EPOCH"]))),
        "REQUIRES": "\n".join(f"Requires:       {need}" for need in needs),
        "BUILD_REQUIRES": "\n".join(f"BuildRequires:  {need}" for need in build),
    }
    text = (ROOT / "deploy/rpm/ebpf-mig.spec.in").read_text()
    return re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], text)


def main() -> None:
    """See the module."""
    if sys.argv[1:] == ["depends"]:
        print("\n".join(depends()))  # noqa: T201
    elif sys.argv[1:] == ["spec"]:
        print(spec(), end="")  # noqa: T201
    elif sys.argv[1] == "sbom":
        print(json.dumps(sbom(Path(sys.argv[2]), deb="deb" in sys.argv[3:]), indent=1))  # noqa: T201
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
