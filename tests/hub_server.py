"""A Hugging Face hub on localhost, as much of it as tools/publish.py calls: create, upload (LFS and
regular), download.

Written against the requests that huggingface_hub sends with HF_HUB_DISABLE_XET=1:
/api/repos/create, preupload, the LFS batch call, PUT of each object, commit, tree, resolve.
Everything lives in memory; a wrong token is answered 401.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """`files`: {repository: {path: bytes}}.

    `private`: repositories that need the token; `requests`: what was asked.
    """

    def __init__(self, token):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.files, self.private, self.objects, self.requests = token, {}, set(), {}, []
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words):
        """Nothing on standard error."""

    def answer(self, body=b"", code=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {
            "Content-Length": str(len(body)),
            "X-Repo-Commit": COMMIT,
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code, name):
        self.answer({"error": name}, code, X_Error_Code=name, X_Error_Message=name)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def known(self):
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def do_POST(self):
        path, body = urlparse(self.path).path, self.body()
        self.server.requests.append(("POST", path))
        if not self.known():
            return self.refuse(401, "Unauthorized")
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}"
            if repo in self.server.files:
                return self.answer({"error": "exists", "url": f"{self.server.address}/{repo}"}, 409)
            self.server.files[repo] = {}
            if wanted.get("visibility") == "private" or wanted.get("private"):
                self.server.private.add(repo)
            return self.answer({"url": f"{self.server.address}/{repo}"})
        if path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            put = [
                {**o, "actions": {"upload": {"href": f"{self.server.address}/put/{o['oid']}"}}}
                for o in wanted
            ]
            return self.answer({"transfer": "basic", "objects": put})
        _, _, _, user, name, call, *_ = path.split("/")
        if call == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "shouldIgnore": False,
                    "uploadMode": (
                        "lfs" if file["path"].endswith((".pt", ".bin", ".png")) else "regular"
                    ),
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        if call == "commit":
            for line in body.splitlines():
                about = json.loads(line)
                value = about["value"]
                if about["key"] == "file":
                    self.server.files[f"{user}/{name}"][value["path"]] = base64.b64decode(
                        value["content"]
                    )
                elif about["key"] == "lfsFile":
                    self.server.files[f"{user}/{name}"][value["path"]] = self.server.objects[
                        value["oid"]
                    ]
            return self.answer(
                {
                    "commitUrl": f"{self.server.address}/{user}/{name}/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "success": True,
                }
            )
        return self.refuse(404, "NotFound")

    def do_PUT(self):
        data, wanted = self.body(), self.path.rsplit("/", 1)[1]
        self.server.requests.append(("PUT", self.path))
        if hashlib.sha256(data).hexdigest() != wanted:
            return self.refuse(400, "BadDigest")
        self.server.objects[wanted] = data
        return self.answer()

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        self.server.requests.append((self.command, path))
        parts = path.strip("/").split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repo not in self.server.files or (repo in self.server.private and not self.known()):
            return self.refuse(404, "RepoNotFound")
        files = self.server.files[repo]
        if parts[0] == "api" and parts[4:5] == ["tree"]:
            return self.answer(
                [
                    {
                        "type": "file",
                        "path": name,
                        "size": len(data),
                        "oid": hashlib.sha1(data).hexdigest(),
                    }
                    for name, data in files.items()
                ]
            )
        if parts[0] == "api":
            return self.answer(
                {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            )
        data = files.get("/".join(parts[4:])) if parts[2] == "resolve" else None
        if data is None:
            return self.refuse(404, "EntryNotFound")
        return self.answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"')

    do_HEAD = do_GET
