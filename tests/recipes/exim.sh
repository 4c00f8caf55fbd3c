by_mail exim "exim -qff"
versions exim4-daemon-light
