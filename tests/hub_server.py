"""A stand-in of the Hugging Face hub: the part of its API that uploads and downloads models, over files in a folder.

Run: ``python tests/hub_server.py FOLDER``; it prints its address. Repositories lie in ``FOLDER/OWNER/NAME``. Files of
safetensors go through the large file storage, others within the commit, as on the hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import sys
from pathlib import Path

import uvicorn
import yaml
from fastapi import FastAPI, Request, Response

ROOT = Path(sys.argv[1])
COMMIT = "a" * 40
app = FastAPI()


def missing() -> Response:
    return Response(status_code=404, headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})


def other(revision: str) -> Response | None:
    """The answer for a revision that is neither the branch nor its commit."""
    return None if revision in ("main", COMMIT) else Response(status_code=404, headers={"X-Error-Code": "RevisionNotFound"})


@app.post("/api/repos/create")
async def create(request: Request) -> object:
    asked = await request.json()
    if request.headers.get("authorization") != "Bearer good":
        return Response(status_code=401, headers={"X-Error-Message": "Invalid user token."})
    name = f"{asked.get('organization') or 'me'}/{asked['name']}"
    (ROOT / name).mkdir(parents=True, exist_ok=True)
    return {"url": f"{request.base_url}{name}", "name": name}


@app.post("/api/validate-yaml")
async def validate(request: Request) -> dict:
    header = (await request.json())["content"].split("---")[1]
    assert isinstance(yaml.safe_load(header), dict)
    return {"errors": [], "warnings": []}


@app.post("/api/models/{owner}/{name}/preupload/{revision}")
async def preupload(owner: str, name: str, revision: str, request: Request) -> object:
    files = (await request.json())["files"]
    mode = {True: "lfs", False: "regular"}
    return {"files": [{**f, "uploadMode": mode[f["path"].endswith(".safetensors")], "shouldIgnore": False} for f in files]}


@app.post("/{owner}/{name}.git/info/lfs/objects/batch")
async def batch(owner: str, name: str, request: Request) -> Response:
    objects = (await request.json())["objects"]
    base = str(request.base_url)
    found = [{**o, "actions": {"upload": {"href": f"{base}lfs/{o['oid']}"}}} for o in objects]
    return Response(json.dumps({"transfer": "basic", "objects": found}), media_type="application/vnd.git-lfs+json")


@app.put("/lfs/{oid}")
async def put(oid: str, request: Request) -> dict:
    content = await request.body()
    assert hashlib.sha256(content).hexdigest() == oid
    (ROOT / "lfs").mkdir(exist_ok=True)
    (ROOT / "lfs" / oid).write_bytes(content)
    return {}


@app.post("/api/models/{owner}/{name}/commit/{revision}")
async def commit(owner: str, name: str, revision: str, request: Request) -> object:
    for line in (await request.body()).splitlines():
        entry = json.loads(line)
        value = entry["value"]
        path = ROOT / owner / name / value.get("path", "")
        if entry["key"] == "deletedFile":
            path.unlink()
        elif entry["key"] == "file":
            path.write_bytes(base64.b64decode(value["content"]))
        elif entry["key"] == "lfsFile":
            path.write_bytes((ROOT / "lfs" / value["oid"]).read_bytes())
    return {"commitUrl": f"{request.base_url}{owner}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""}


@app.get("/api/models/{owner}/{name}/revision/{revision}")
@app.get("/api/models/{owner}/{name}")
async def info(owner: str, name: str, revision: str = "main") -> object:
    place = ROOT / owner / name
    if not place.is_dir():
        return missing()
    if (answer := other(revision)) is not None:
        return answer
    names = sorted(path.name for path in place.iterdir())
    return {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": n} for n in names], "private": False}


@app.get("/api/models/{owner}/{name}/tree/{revision}")
async def tree(owner: str, name: str, revision: str) -> object:
    place = ROOT / owner / name
    if not place.is_dir():
        return missing()
    if (answer := other(revision)) is not None:
        return answer
    return [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40} for p in sorted(place.iterdir())]


@app.api_route("/{owner}/{name}/resolve/{revision}/{file}", methods=["GET", "HEAD"])
async def resolve(owner: str, name: str, revision: str, file: str, request: Request) -> Response:
    path = ROOT / owner / name / file
    if not path.is_file():
        return Response(status_code=404, headers={"X-Error-Code": "EntryNotFound"})
    with (ROOT / "asked.txt").open("a") as log:
        log.write(f"{request.method} {file}\n")
    content = path.read_bytes()
    heads = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}
    return Response(b"" if request.method == "HEAD" else content, headers=heads)


if __name__ == "__main__":
    opened = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{opened.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[opened])
