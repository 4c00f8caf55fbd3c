by_server uwsgi http://127.0.0.1:8080
versions uwsgi-core uwsgi-plugin-python3
