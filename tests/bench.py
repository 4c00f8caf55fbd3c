"""Messages a second, against the same server doing nothing but parsing the same JSON.

    apt-get install wrk; python tests/bench.py [seconds]

wrk posts 12 KB canonical mails, each with a Message-ID of its own, over 16 connections on this machine.
Nothing is asserted: the number belongs to the machine.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LUA = """
local thread_count = 0
function setup(thread) thread:set("id", thread_count); thread_count = thread_count + 1 end
function init(args) count = 0; text = string.rep("It burns. The printer, I mean, again.\\\\n", 310) end
function request()
  count = count + 1
  local key = id .. "-" .. count .. "-" .. os.time()
  return wrk.format("POST", nil, {["Content-Type"] = "application/json",
    ["X-Mobieus-Inbound-Secret"] = "SECRET"},
    '{"from": "Ada <ada' .. key .. '@customer.example>", "subject": "Printer", "message_id": "<' .. key ..
    '@customer.example>", "headers": {"Date": "Mon, 21 Sep 2026 16:12:07 +0200", "MIME-Version": "1.0"},' ..
    '"text": "' .. text .. '"}')
end
"""
BASELINE = """
import json, waitress
def app(environ, start_response):
    json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
server = waitress.create_server(app, listen="127.0.0.1:0", threads=8, asyncore_use_poll=True)
print(f"http://127.0.0.1:{server.effective_port}/", flush=True)
server.run()
"""


def measure(command, seconds, folder):
    """Start a server, let wrk at it; return (requests a second, 99th percentile, its whole report)."""
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        url, secret = "", ""
        while not (url := re.match(r"\s*(http://\S+)", url)):
            url = server.stdout.readline()
            secret = secret or "".join(re.findall(r"^  ([\w-]{32})$", url, re.M))
        script = Path(folder, "post.lua")
        script.write_text(LUA.replace("SECRET", secret))
        report = subprocess.run(["wrk", "-t2", "-c16", f"-d{seconds}s", "--latency", "-s", script,
                                 url[1].partition("?")[0]], capture_output=True, text=True, check=True).stdout
        return (float(re.search(r"Requests/sec:\s*([\d.]+)", report)[1]),
                re.search(r"99%\s*(\S+)", report)[1], report)
    finally:
        server.terminate()
        server.wait()


def main():
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    with tempfile.TemporaryDirectory(dir=HERE) as folder:
        serve = [sys.executable, str(HERE.parent / "inbound.py"), "--db", os.path.join(folder, "bench.db"),
                 "serve", "--listen", "127.0.0.1:0"]
        for name, command in (("inbound", serve), ("only json.loads", [sys.executable, "-c", BASELINE])):
            rate, slowest, report = measure(command, seconds, folder)
            refused = re.search(r"Non-2xx.*", report)
            print(json.dumps({"server": name, "messages a second": rate, "99 % within": slowest,
                              "refused": refused[0] if refused else 0}))


if __name__ == "__main__":
    main()
