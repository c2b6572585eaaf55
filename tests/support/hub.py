"""A hub on loopback with one model repository, me/dict, that can be made, pushed to and read."""

import base64
import json

from tests.stream.faulty_server import HubHandler


class ModelHub(HubHandler):
    """Serves `folder`/me/dict; a commit writes there. What was asked for is in `seen`, commits included."""

    REPOSITORY = "/api/models/me/dict"
    FILES = ("/me/dict/resolve/main/",)

    def asked(self) -> str:
        return f"me/dict/{super().asked()}"

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length) if length else self._chunks()
        self.seen.append(f"{self.path} {self.headers.get('Authorization', '')}")
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            (self.folder / "me" / "dict").mkdir(parents=True, exist_ok=True)
            self.seen.append(body.decode())
            self.describe({"url": f"http://{self.headers['Host']}/me/dict", "id": "me/dict", "name": "me/dict"})
        elif path == "/api/validate-yaml":
            self.describe({"errors": [], "warnings": []})
        elif path == f"{self.REPOSITORY}/preupload/main":
            files = json.loads(body)["files"]
            self.describe(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif path == f"{self.REPOSITORY}/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    (self.folder / "me" / "dict" / line["value"]["path"]).write_bytes(content)
            self.describe({"commitUrl": f"http://{self.headers['Host']}/me/dict/commit/1", "commitOid": "1" * 40})
        else:
            self.send_error(404)

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts)
