"""The ordinary version of the same endpoint: Flask, SQLAlchemy, SQLite. bench.py measures it.

    pip install flask sqlalchemy waitress; python tests/peer_flask.py FILE SECRET

Written as a developer who knows these tools would: models with the indexes that the queries need,
a session per request, WAL with synchronous=FULL, so that its 200 promises what ours does: on disk,
a repeat changes nothing, a reply finds its ticket, a person's new ticket gets one confirmation,
capped per hour. It reads one shape, our canonical JSON; no raw mail, providers or hostile input.
"""

import email.utils
import hashlib
import hmac
import json
import re
import secrets
import sys
import threading
import time
from email.message import EmailMessage

import flask
import sqlalchemy as sa
import waitress
from sqlalchemy import orm

CONFIRMATIONS_PER_HOUR = 200    # as ours, so that both do the same for a mail
ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
OURS = "support@helpdesk.example"


class Base(orm.DeclarativeBase):
    pass


class Ticket(Base):
    __tablename__ = "ticket"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    reference: orm.Mapped[str] = orm.mapped_column(unique=True)
    subject: orm.Mapped[str]
    requester: orm.Mapped[str]
    requester_name: orm.Mapped[str]
    status: orm.Mapped[str] = orm.mapped_column(default="open")
    created_at: orm.Mapped[int]
    updated_at: orm.Mapped[int]


class Message(Base):
    __tablename__ = "message"
    __table_args__ = (sa.UniqueConstraint("message_id", "digest"),)
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    ticket_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("ticket.id"), index=True)
    message_id: orm.Mapped[str]
    digest: orm.Mapped[str]
    in_reply_to: orm.Mapped[str | None]
    references: orm.Mapped[list] = orm.mapped_column(sa.JSON)
    from_address: orm.Mapped[str]
    from_name: orm.Mapped[str]
    subject: orm.Mapped[str]
    text: orm.Mapped[str]
    html: orm.Mapped[str | None]
    headers: orm.Mapped[dict] = orm.mapped_column(sa.JSON)
    kind: orm.Mapped[str]
    received_at: orm.Mapped[int]
    ticket: orm.Mapped[Ticket] = orm.relationship()


class Confirmation(Base):
    __tablename__ = "confirmation"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    ticket_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("ticket.id"))
    recipient: orm.Mapped[str]
    content: orm.Mapped[str]
    state: orm.Mapped[str] = orm.mapped_column(default="queued")
    created_at: orm.Mapped[int] = orm.mapped_column(index=True)


def make_engine(path):
    engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 10}, pool_size=8)

    @sa.event.listens_for(engine, "connect")
    def set_pragmas(connection, _):
        connection.isolation_level = None   # SQLAlchemy's recipe: we say BEGIN ourselves, below
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @sa.event.listens_for(engine, "begin")
    def begin(connection):
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    Base.metadata.create_all(engine)
    return engine


def make_app(engine, secret):
    app = flask.Flask(__name__)
    new_session = orm.sessionmaker(engine)
    writing = threading.Lock()      # SQLite's own wait for a lock sleeps and polls: this is faster

    @app.post("/api/helpdesk/inbound-email")
    def receive():
        given = flask.request.headers.get("X-Mobieus-Inbound-Secret", "")
        if not hmac.compare_digest(given.encode(), secret.encode()):
            return {"error": "wrong secret"}, 401
        mail = flask.request.get_json()
        from_name, from_address = email.utils.parseaddr(mail.get("from") or "")
        ids = ids_of(mail.get("message_id"))
        if "@" not in from_address or not ids:
            return {"error": "from and message_id are required"}, 422
        message = message_of(mail, from_name, from_address, ids[0])
        with writing, new_session.begin() as session:
            return store(session, message)

    return app


def ids_of(value):
    """The message-ids in a header's text or in a list of them, in order."""
    return re.findall(r"<[^<>\s]+>", " ".join(value) if isinstance(value, list) else value or "")


def message_of(mail, from_name, from_address, message_id):
    """Return the Message of a canonical body, not yet on any ticket."""
    subject, text = mail.get("subject") or "(no subject)", mail.get("text") or ""
    wrote = json.dumps([from_address, subject, text, mail.get("html")])
    return Message(
        message_id=message_id, digest=hashlib.sha256(wrote.encode()).hexdigest(),
        in_reply_to=next(iter(ids_of(mail.get("in_reply_to"))), None),
        references=ids_of(mail.get("references")), from_address=from_address,
        from_name=from_name, subject=subject, text=text, html=mail.get("html"),
        headers=mail.get("headers") or {}, kind=kind_of(mail, from_address),
        received_at=int(time.time()))


def kind_of(mail, from_address):
    """Automatic mail is not confirmed: the headers that everybody looks at."""
    headers = {name.lower(): str(value) for name, value in (mail.get("headers") or {}).items()}
    if (mail.get("envelope") or {}).get("from") in ("", "<>"):
        return "bounce"
    if headers.get("auto-submitted", "no").lower() != "no" or "x-autoreply" in headers:
        return "auto-reply"
    if "list-id" in headers or headers.get("precedence", "").lower() in ("bulk", "list", "junk"):
        return "bulk"
    if re.match(r"(?i)(no-?reply|mailer-daemon|postmaster)@", from_address):
        return "machine"
    return "human"


def store(session, message):
    """Settle a repeat, find or open the ticket, confirm it; return the answer."""
    same = sa.select(Message).where(Message.message_id == message.message_id,
                                    Message.digest == message.digest)
    if known := session.scalar(same):
        return answer("duplicate", known, "not due")
    status, confirmation = "appended", "not due"
    ticket = find_ticket(session, message)
    if ticket is None:
        status, ticket = "created", open_ticket(message)
    elif message.kind == "human":
        ticket.status = "open"
    ticket.updated_at = message.received_at
    message.ticket = ticket
    session.add(message)
    if status == "created":
        confirmation = confirm(session, message)
    session.flush()
    return answer(status, message, confirmation)


def find_ticket(session, message):
    """In-Reply-To first, then References from the last to the first."""
    parents = [message.in_reply_to, *reversed(message.references)]
    parents = [parent for parent in parents if parent]
    if not parents:
        return None
    found = session.execute(sa.select(Message.message_id, Ticket).join(Message.ticket)
                            .where(Message.message_id.in_(parents))).all()
    tickets = dict(found)
    return next((tickets[parent] for parent in parents if parent in tickets), None)


def open_ticket(message):
    letters = "".join(secrets.choice(ALPHABET) for _ in range(8))
    return Ticket(reference=f"T-{letters[:4]}-{letters[4:]}", subject=message.subject,
                  requester=message.from_address, requester_name=message.from_name,
                  created_at=message.received_at, updated_at=message.received_at)


def confirm(session, message):
    """Queue the confirmation of a new ticket, if it is due; return what became of it."""
    hour = Confirmation.created_at > message.received_at - 3600
    sent = session.scalar(sa.select(sa.func.count()).select_from(Confirmation).where(hour))
    if message.kind != "human" or sent >= CONFIRMATIONS_PER_HOUR:
        return "withheld"
    session.flush()     # gives the ticket its id
    mail = EmailMessage()
    mail["From"], mail["To"] = OURS, message.from_address
    mail["Subject"] = f"[{message.ticket.reference}] We received your message"
    mail["Message-ID"] = email.utils.make_msgid(domain="helpdesk.example")
    mail["In-Reply-To"] = mail["References"] = message.message_id
    mail["Auto-Submitted"] = "auto-replied"
    mail.set_content(f"Your reference is {message.ticket.reference}. Reply to add to it.\n")
    session.add(Confirmation(ticket_id=message.ticket.id, recipient=message.from_address,
                             content=mail.as_string(), created_at=message.received_at))
    return "queued"


def answer(status, message, confirmation):
    return {"status": status, "ticket": message.ticket.reference, "message": message.id,
            "kind": message.kind, "confirmation": confirmation}


def main(path, secret):
    app = make_app(make_engine(path), secret)
    server = waitress.create_server(app, listen="127.0.0.1:0", threads=8)
    print(f"http://127.0.0.1:{server.effective_port}/api/helpdesk/inbound-email", flush=True)
    server.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
