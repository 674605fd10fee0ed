"""Print a lock file from the report of `pip install --dry-run --ignore-installed --report report.json ...`."""

import json
import re
import sys


def locked(report: dict) -> list[str]:
    """Return sorted lines `name==version --hash=sha256:...`, one for each archive. Leave out folders."""
    lines = []
    for item in report["install"]:
        if "archive_info" in item["download_info"]:
            name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
            version, digest = item["metadata"]["version"], item["download_info"]["archive_info"]["hashes"]["sha256"]
            lines.append(f"{name}=={version} --hash=sha256:{digest}")
    return sorted(lines)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(*locked(json.load(file)), sep="\n")
