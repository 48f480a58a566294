"""Exits with 0 if this container's service answers: healthcheck.py PATH VARIABLE, whose port has precedence over PORT.

It uses http.client because urllib would use a proxy from the environment.
"""

import http.client
import os
import sys

path, variable = sys.argv[1:]
connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get(variable) or os.environ["PORT"]), timeout=4)
connection.request("GET", path)
status = connection.getresponse().status
sys.exit(0 if status == 200 else f"{path}: {status}")
