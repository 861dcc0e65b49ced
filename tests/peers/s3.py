"""A real S3 server (moto) that creates objects atomically: s3.py HOST PORT

moto's own server lets two of many concurrent conditional creates win now and then, and is then refused, as it should be.
Here each request is read whole and then served alone; connections still have threads of their own, so that one that
stands still holds nobody up.
"""

import io
import sys
import threading

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

dispatcher = DomainDispatcherApplication(create_backend_app)
alone = threading.Lock()


def serve(environ, start_response):
    length = int(environ.get("CONTENT_LENGTH") or 0)
    if length or not environ.get("wsgi.input_terminated"):
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
    with alone:
        return [b"".join(dispatcher(environ, start_response))]


run_simple(sys.argv[1], int(sys.argv[2]), serve, threaded=True)
