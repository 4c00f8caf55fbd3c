-- inbound: email in, tickets out. The schema is public: query it, and administer with it.
--
-- Every time is INTEGER seconds UTC (readable: datetime(created_at, 'unixepoch')).
-- A column that points to a row has that table's name. message_id is always the header, <brackets> included.
-- Comments stand inside the parentheses, so that they survive in `.schema` of a live file.
-- A later version changes this file and adds a step to MIGRATIONS in inbound.py. A CHECK is named with the
-- sentence that its violation is answered with.

PRAGMA application_id = 1768841828;  -- "inbd" in ASCII: tells our file from another SQLite file
PRAGMA user_version = 3;

-- Administered: changed by the command line or by plain SQL, in force for the next request ----------------

CREATE TABLE queue (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE           -- as people say it; 'Automatic' takes unmatched automatic mail
        CONSTRAINT "a queue needs a name" CHECK (trim(name) <> ''),
    is_default INTEGER NOT NULL DEFAULT 0 CHECK (is_default IN (0, 1))
) STRICT;
CREATE TRIGGER queue_automatic_name BEFORE UPDATE OF name ON queue WHEN OLD.name = 'Automatic' BEGIN
    SELECT RAISE(ABORT, 'unmatched automatic mail goes to this queue');
END;
CREATE TRIGGER queue_automatic BEFORE DELETE ON queue WHEN OLD.name = 'Automatic' BEGIN
    SELECT RAISE(ABORT, 'unmatched automatic mail goes to this queue');
END;
CREATE UNIQUE INDEX queue_default ON queue (is_default) WHERE is_default;  -- at most one

CREATE TABLE email_account (
    id INTEGER PRIMARY KEY,
    address TEXT NOT NULL UNIQUE COLLATE NOCASE     -- addr-spec that mail arrives at and leaves from
        CONSTRAINT "an address looks like support@example.org"
        CHECK (address LIKE '_%@_%' AND address NOT GLOB '*[^!-~]*' AND address NOT GLOB '*[<>(),;:"\]*'),
    display_name TEXT DEFAULT 'Support',            -- stands before the address in our From; NULL = none
    queue INTEGER NOT NULL REFERENCES queue,        -- new tickets of people go here
    is_default INTEGER NOT NULL DEFAULT 0 CHECK (is_default IN (0, 1)),

    -- What proves that a caller may post. NULL = unset, which never matches anything.
    -- 16 or more printable ASCII characters, so that one secret fits a header, a URL and HTTP Basic.
    inbound_secret TEXT UNIQUE
        CONSTRAINT "a secret has 16 or more printable ASCII characters"
        CHECK (length(inbound_secret) >= 16 AND inbound_secret NOT GLOB '*[^ -~]*'),
    previous_secret TEXT                            -- still accepted after `secret rotate` …
        CONSTRAINT "a previous secret has 16 or more printable ASCII characters"
        CHECK (length(previous_secret) >= 16 AND previous_secret NOT GLOB '*[^ -~]*'),
    previous_secret_until INTEGER,                  -- … until this time
    previous_secret_used_at INTEGER,                -- when it was last accepted; NULL = never since
    validation_key TEXT CHECK (validation_key <> ''),  -- SocketLabs' answer; NULL = no SocketLabs

    -- The relay that our mail leaves by. NULL host = none yet: mail waits in the outbox, 24 h at most.
    smtp_host TEXT CHECK (smtp_host <> ''),
    smtp_port INTEGER                               -- NULL = 25 none, 587 starttls, 465 tls
        CONSTRAINT "a port is a number from 1 to 65535" CHECK (smtp_port BETWEEN 1 AND 65535),
    smtp_security TEXT NOT NULL DEFAULT 'starttls'
        CONSTRAINT "smtp_security is none, starttls or tls" CHECK (smtp_security IN ('none', 'starttls', 'tls')),
    smtp_username TEXT,                             -- NULL = no log-in
    smtp_password TEXT,

    -- The confirmation.
    confirmation_envelope_from TEXT                 -- MAIL FROM; NULL = <>, which some relays refuse
        CONSTRAINT "confirmation_envelope_from is an address, or empty for <>"
        CHECK (confirmation_envelope_from NOT GLOB '*[^!-~]*'
               AND confirmation_envelope_from NOT GLOB '*[<>(),;:"\]*'),
    -- Its text: plain, {reference} stands for T-XXXX-XXXX.
    template TEXT NOT NULL DEFAULT 'Hello,

we have received your message and opened a ticket for it.

Your reference: {reference}

To add something, just reply to this mail.
' CONSTRAINT "a template needs {reference} in it" CHECK (instr(template, '{reference}')),
    -- Caps: past them a ticket is opened and not confirmed. A mailbox is counted as its provider counts it.
    confirmations_per_address_hour INTEGER NOT NULL DEFAULT 3 CHECK (confirmations_per_address_hour >= 0),
    confirmations_per_address_day INTEGER NOT NULL DEFAULT 10 CHECK (confirmations_per_address_day >= 0),
    confirmations_per_domain_hour INTEGER NOT NULL DEFAULT 30   -- domains of large mail providers apart
        CHECK (confirmations_per_domain_hour >= 0),
    confirmations_per_hour INTEGER NOT NULL DEFAULT 200 CHECK (confirmations_per_hour >= 0),

    -- Addresses, separated by commas, that forward to us: a group, a mailbox with a forwarding rule.
    -- The List-Id or `Auto-Submitted: auto-generated` that they stamp on a person's mail does not count.
    trusted_forwarders TEXT                         -- NULL = none
        CONSTRAINT "trusted_forwarders are addresses between commas"
        CHECK (trusted_forwarders LIKE '_%@_%'),

    -- Addresses, separated by commas, of the team: each is told of what people write, and answers by mail.
    staff TEXT                                      -- NULL = nobody is told
        CONSTRAINT "staff are addresses between commas" CHECK (staff LIKE '_%@_%'),
    notices_per_hour INTEGER NOT NULL DEFAULT 60    -- to one of the team; past it one summary an hour
        CHECK (notices_per_hour >= 0),

    replica_socket TEXT                             -- path of Litestream's socket; NULL = none
        CHECK (replica_socket <> ''),

    CHECK (previous_secret IS NULL OR previous_secret_until IS NOT NULL),
    CONSTRAINT "no password goes over plain text: smtp_security=starttls or tls, or no smtp_username"
        CHECK (smtp_security <> 'none' OR smtp_username IS NULL)
) STRICT;
CREATE UNIQUE INDEX email_account_default ON email_account (is_default) WHERE is_default;  -- at most one
CREATE TRIGGER email_account_default BEFORE UPDATE OF is_default ON email_account WHEN NEW.is_default BEGIN
    UPDATE email_account SET is_default = 0 WHERE id <> NEW.id;  -- a new default replaces the old one
END;

-- Shapes of your own: how a system that inbound does not know posts its mail --------------------------------

CREATE TABLE provider (
    -- A post that holds the paths of from and of message_id is read by its row, if no provider that inbound
    -- knows claims it. A row that makes no sense costs no mail; `inbound doctor` names it.
    name TEXT NOT NULL UNIQUE,
    fields TEXT NOT NULL                            -- JSON object: canonical field -> path in the post (a.b.0);
                                                    -- besides from and message_id any of subject, text, html, to,
                                                    -- cc, headers, in_reply_to, references, attachments
        CONSTRAINT "fields is a JSON object, like {""from"": ""sender.address"", ""message_id"": ""id""}"
        CHECK (json_valid(fields) AND json_type(fields) = 'object')
) STRICT;

-- Kept: what people wrote and what became of it ------------------------------------------------------------

CREATE TABLE ticket (
    id INTEGER PRIMARY KEY,
    reference TEXT NOT NULL UNIQUE                  -- T-XXXX-XXXX, random Crockford base32
        CHECK (reference GLOB 'T-[0-9A-HJKMNP-TV-Z][0-9A-HJKMNP-TV-Z][0-9A-HJKMNP-TV-Z][0-9A-HJKMNP-TV-Z]'
                           || '-[0-9A-HJKMNP-TV-Z][0-9A-HJKMNP-TV-Z][0-9A-HJKMNP-TV-Z][0-9A-HJKMNP-TV-Z]'),
    queue INTEGER NOT NULL REFERENCES queue,
    email_account INTEGER NOT NULL REFERENCES email_account,
    subject TEXT NOT NULL,                          -- of the first message
    requester TEXT NOT NULL COLLATE NOCASE,         -- From address of the first message; never changes
    requester_name TEXT NOT NULL,                   -- '' = none given
    status TEXT NOT NULL DEFAULT 'open' CHECK (status IN ('open', 'closed')),
    last_writer TEXT NOT NULL DEFAULT 'customer'    -- automatic replies, bounces and notices do not count
        CHECK (last_writer IN ('customer', 'team')),
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL                     -- of the last message or change of status
) STRICT;
CREATE INDEX ticket_open ON ticket (updated_at) WHERE status = 'open';  -- tickets
CREATE INDEX ticket_updated ON ticket (updated_at);                    -- tickets closed, tickets all
CREATE INDEX ticket_requester ON ticket (requester);                   -- tickets --from

CREATE TRIGGER ticket_delete AFTER DELETE ON ticket BEGIN  -- also in a shell that has foreign keys off
    DELETE FROM message WHERE ticket = OLD.id;
END;

CREATE TABLE message (
    id INTEGER PRIMARY KEY,
    ticket INTEGER NOT NULL REFERENCES ticket ON DELETE CASCADE,
    email_account INTEGER NOT NULL REFERENCES email_account,
    direction TEXT NOT NULL CHECK (direction IN ('in', 'out')),     -- out: ours, or a mail of the team's
    message_id TEXT NOT NULL,                       -- as written, or <…@missing.invalid> made of the content
    digest TEXT NOT NULL,                           -- SHA-256, hex, of what the sender wrote; '' = written here
    in_reply_to TEXT,                               -- message-ids, one space between them; NULL = none
    "references" TEXT NOT NULL,                     -- JSON list of message-ids; first 20 and last 80 of them
    from_address TEXT NOT NULL COLLATE NOCASE,      -- From:, else the envelope sender, else MAILER-DAEMON
    from_name TEXT NOT NULL,                        -- '' = none
    envelope_from TEXT,                             -- MAIL FROM; '' = null sender, NULL = nobody told us
    "to" TEXT NOT NULL,                             -- JSON list of addresses, for display only
    cc TEXT NOT NULL,                               -- likewise
    subject TEXT NOT NULL,
    text TEXT NOT NULL,                             -- whole; made from the HTML when the mail has no text
    html TEXT,                                      -- NULL = none
    headers TEXT NOT NULL CHECK (headers LIKE '[%]'),  -- JSON list of [name, value], order and repeats kept
    kind TEXT CHECK (kind IN ('human', 'auto-reply', 'bounce', 'machine', 'list', 'bulk')),  -- NULL = out
    reason TEXT NOT NULL,                           -- why this kind, this ticket and (not) confirmed, as decided
    confirmation TEXT CHECK (confirmation IN ('queued', 'withheld', 'not due')),  -- NULL = direction out
    notes TEXT NOT NULL CHECK (notes LIKE '[%]'),  -- JSON list: what was odd, e.g. that a stranger wrote it
    received_at INTEGER NOT NULL,                   -- when it was stored (direction out: composed)
    CHECK ((direction = 'in') = (kind IS NOT NULL)),
    CHECK ((direction = 'in') = (confirmation IS NOT NULL)),
    UNIQUE (email_account, message_id, digest)      -- the same message twice changes nothing
) STRICT;
CREATE TRIGGER message_delete AFTER DELETE ON message BEGIN
    DELETE FROM attachment WHERE message = OLD.id;
    DELETE FROM outbox WHERE message = OLD.id;
END;
CREATE INDEX message_ticket ON message (ticket);    -- show; the view; ON DELETE CASCADE
CREATE INDEX message_thread ON message (email_account, message_id COLLATE NOCASE);  -- thread

CREATE TABLE attachment (
    id INTEGER PRIMARY KEY,
    message INTEGER NOT NULL REFERENCES message ON DELETE CASCADE,
    filename TEXT NOT NULL,                         -- text to show, never a path; '' = none given
    content_type TEXT NOT NULL,                     -- as the sender says it, lower case
    content_id TEXT NOT NULL,                       -- without brackets; '' = none
    size INTEGER NOT NULL CHECK (size >= 0),        -- bytes, decoded
    sha256 TEXT,                                    -- of content, hex; NULL = could not be decoded
    content BLOB,                                   -- NULL likewise
    note TEXT NOT NULL DEFAULT '',                  -- why it could not be
    CHECK ((sha256 IS NULL) = (content IS NULL))
) STRICT;
CREATE INDEX attachment_message ON attachment (message);  -- show; ON DELETE CASCADE

-- In motion -------------------------------------------------------------------------------------------------

CREATE TABLE outbox (
    -- state     next_attempt_at   means
    -- queued    due time          waits: first try, next try, or for an smtp_host
    -- sending   end of the lease  one courier has it; past that time it is queued again
    -- sent      NULL              the relay answered 250
    -- failed    NULL              5xx, or 24 h without success, or it bounced later; last_error says which
    --
    -- queued → sending → sent | failed | queued (temporary failure, or the lease ran out)
    -- sending | sent → failed (a bounce came back)      failed → queued (`outbox retry`)
    --
    -- purpose        to          message
    -- confirmation   requester   itself
    -- reply          anyone      itself, written by `inbound reply`
    -- answer         requester   what one of the team sent us: this is it without our footer, under our address
    -- notice         the team    what it tells of
    -- summary        the team    the one that was too much for a notice of its own
    -- refusal        its writer  what was no answer; says why
    id INTEGER PRIMARY KEY,
    message INTEGER NOT NULL REFERENCES message ON DELETE CASCADE,
    email_account INTEGER NOT NULL REFERENCES email_account,
    purpose TEXT NOT NULL
        CHECK (purpose IN ('confirmation', 'reply', 'answer', 'notice', 'summary', 'refusal')),
    own_message_id TEXT NOT NULL,                   -- of this very mail; who names a notice's answers it
    recipient TEXT NOT NULL,                        -- the one RCPT TO
    mailbox TEXT NOT NULL,                          -- what the spellings of recipient have in common: for caps
    domain TEXT NOT NULL DEFAULT '',                -- whose it is, without sub-domains: likewise
    content BLOB NOT NULL,                          -- the mail, CRLF line ends; its bytes never change
    state TEXT NOT NULL DEFAULT 'queued' CHECK (state IN ('queued', 'sending', 'sent', 'failed')),
    attempts INTEGER NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    created_at INTEGER NOT NULL,
    next_attempt_at INTEGER,
    give_up_at INTEGER NOT NULL,                    -- created_at + 24 h; `outbox retry` moves it
    last_error TEXT NOT NULL DEFAULT '',            -- the relay's own words; '' = none
    CHECK ((state IN ('queued', 'sending')) = (next_attempt_at IS NOT NULL)),
    CHECK (state <> 'failed' OR last_error <> '')
) STRICT;
CREATE INDEX outbox_message ON outbox (message);    -- parties; notices of a ticket; ON DELETE CASCADE
CREATE INDEX outbox_own_id ON outbox (email_account, own_message_id COLLATE NOCASE)  -- thread, by what is
    WHERE purpose NOT IN ('confirmation', 'reply');                                  -- no message's own id
CREATE INDEX outbox_state ON outbox (state, email_account, next_attempt_at);     -- claim; troubles
CREATE INDEX outbox_created ON outbox (created_at) WHERE next_attempt_at IS NOT NULL;  -- likewise
CREATE INDEX outbox_mailbox ON outbox (mailbox, purpose, created_at);            -- caps to one address
CREATE INDEX outbox_domain ON outbox (domain, purpose, created_at);              -- cap to one domain
CREATE INDEX outbox_account ON outbox (email_account, purpose, created_at);      -- cap in all

CREATE TABLE rejected (
    -- Posts that proved the secret and could not become a message. `rejected replay` tries them again.
    id INTEGER PRIMARY KEY,
    received_at INTEGER NOT NULL,                   -- when it was last posted; a replay never changes it
    email_account INTEGER REFERENCES email_account ON DELETE SET NULL,
    status INTEGER NOT NULL,                        -- the HTTP status that it was answered with
    reason TEXT NOT NULL,                           -- one sentence
    content_type TEXT NOT NULL,                     -- header of the request, with its parameters
    body BLOB NOT NULL,                             -- as posted, but the secret's own bytes are starred out
    body_sha256 TEXT NOT NULL,                      -- of body, hex; the same body again updates its row
    tries INTEGER NOT NULL DEFAULT 1,               -- how often it was posted unchanged
    UNIQUE (email_account, body_sha256)
) STRICT;

CREATE TABLE refused_caller (
    -- Who posted with no or a wrong secret; the latest 1,000 clients. `inbound doctor` shows the last hour's.
    client TEXT PRIMARY KEY,                        -- address that the server or its trusted proxy saw
    posts INTEGER NOT NULL,                         -- how many
    last_at INTEGER NOT NULL
) STRICT;

-- Read ------------------------------------------------------------------------------------------------------

CREATE VIEW inbox AS                                -- open tickets, newest first, readable times (UTC)
    SELECT ticket.reference, queue.name AS queue, ticket.subject, ticket.requester,
           (SELECT count(*) FROM message WHERE message.ticket = ticket.id) AS messages,
           datetime(ticket.created_at, 'unixepoch') AS created,
           datetime(ticket.updated_at, 'unixepoch') AS updated
    FROM ticket JOIN queue ON queue.id = ticket.queue
    WHERE ticket.status = 'open'
    ORDER BY ticket.created_at DESC, ticket.id DESC;

INSERT INTO queue (name, is_default) VALUES ('Support', 1), ('Automatic', 0);
INSERT INTO email_account (address, queue, is_default) SELECT 'support@localhost', id, 1 FROM queue WHERE is_default;
