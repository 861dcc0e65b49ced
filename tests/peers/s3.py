"""A real S3 server (moto) that creates objects atomically: s3.py HOST PORT [FOLDER]

moto's own server lets two of many concurrent conditional creates win now and then, and is then refused, as it should be.
Here each request is read whole and then served alone; connections still have threads of their own, so that one that
stands still holds nobody up.

With a folder, every object is a file there before its request is answered, and the server begins with what it finds: it
can be killed and started again. If there is no room for the file, the request has no effect and the answer is 507.
"""

import io
import pathlib
import sys
import threading
import urllib.parse

from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import run_simple

dispatcher = DomainDispatcherApplication(create_backend_app)
backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
alone = threading.Lock()
folder = pathlib.Path(sys.argv[3]) if len(sys.argv) > 3 else None
stored = {}


def objects():
    """All there is, by bucket and key."""
    return {(name, key): found for name, bucket in backend.buckets.items() for key, found in bucket.keys.items()}


def place(bucket, key):
    return folder / urllib.parse.quote(bucket, safe="") / urllib.parse.quote(key, safe="")


def load():
    for bucket in sorted(folder.iterdir()):
        backend.create_bucket(urllib.parse.unquote(bucket.name), "us-east-1")
        for file in sorted(bucket.iterdir()):
            if file.suffix == ".part":
                file.unlink()
                continue
            name, key = urllib.parse.unquote(bucket.name), urllib.parse.unquote(file.name)
            stored[name, key] = backend.put_object(name, key, file.read_bytes())


def store():
    """Makes the files what the objects are; whether there was room. If not, the objects are made what the files are."""
    found = objects()
    for name in backend.buckets:
        (folder / urllib.parse.quote(name, safe="")).mkdir(exist_ok=True)
    for name in stored.keys() - found.keys():
        place(*name).unlink()
        del stored[name]
    for name, item in found.items():
        if stored.get(name) is item:
            continue
        part = place(*name).with_suffix(".part")
        try:
            part.write_bytes(item.value)
            part.rename(place(*name))
        except OSError:
            part.unlink(missing_ok=True)
            if name in stored:
                stored[name] = backend.put_object(*name, place(*name).read_bytes())
            else:
                backend.delete_object(*name)
            return False
        stored[name] = item
    return True


def full(environ, start_response):
    body = b"<Error><Code>StorageFull</Code><Message>there is no room left</Message></Error>"
    start_response("507 Insufficient Storage", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


def serve(environ, start_response):
    length = int(environ.get("CONTENT_LENGTH") or 0)
    if length or not environ.get("wsgi.input_terminated"):
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
    with alone:
        started = []
        body = [b"".join(dispatcher(environ, lambda *given: started.append(given)))]
        changes = environ["REQUEST_METHOD"] not in ("GET", "HEAD")
        if folder and changes and not store():
            return full(environ, start_response)
    start_response(*started[-1])
    return body


if folder:
    folder.mkdir(exist_ok=True)
    load()
run_simple(sys.argv[1], int(sys.argv[2]), serve, threaded=True)
