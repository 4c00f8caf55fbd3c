by_server gunicorn http://127.0.0.1:8080
versions gunicorn
