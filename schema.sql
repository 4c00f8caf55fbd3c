-- inbound: email in, tickets out. The schema is public: query it, and administer with it.
--
-- Every time is INTEGER seconds UTC (readable: datetime(created_at, 'unixepoch')).
-- A column that points to a row has that table's name. message_id is always the header, <brackets> included.
-- Comments stand inside the parentheses, so that they survive in `.schema` of a live file.
-- A later version changes this file and adds a step to MIGRATIONS in inbound.py.

PRAGMA application_id = 1768841828;  -- "inbd" in ASCII: tells our file from another SQLite file
PRAGMA user_version = 1;

-- Administered: changed by the command line or by plain SQL, in force for the next request ----------------

CREATE TABLE queue (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,          -- as people say it; 'Automatic' takes unmatched automatic mail
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
        CHECK (address LIKE '_%@_%' AND address NOT GLOB '*[^!-~]*' AND address NOT GLOB '*[<>(),;:"\]*'),
    display_name TEXT DEFAULT 'Support',            -- stands before the address in our From; NULL = none
    queue INTEGER NOT NULL REFERENCES queue,        -- new tickets of people go here
    is_default INTEGER NOT NULL DEFAULT 0 CHECK (is_default IN (0, 1)),

    -- What proves that a caller may post. NULL = unset, which never matches anything.
    -- 16 or more printable ASCII characters, so that one secret fits a header, a URL and HTTP Basic.
    inbound_secret TEXT UNIQUE
        CHECK (length(inbound_secret) >= 16 AND inbound_secret NOT GLOB '*[^ -~]*'),
    previous_secret TEXT                            -- still accepted after `secret rotate` …
        CHECK (length(previous_secret) >= 16 AND previous_secret NOT GLOB '*[^ -~]*'),
    previous_secret_until INTEGER,                  -- … until this time
    validation_key TEXT CHECK (validation_key <> ''),  -- SocketLabs' answer; NULL = no SocketLabs

    -- The relay that our mail leaves by. NULL host = none yet: mail waits in the outbox, 24 h at most.
    smtp_host TEXT CHECK (smtp_host <> ''),
    smtp_port INTEGER CHECK (smtp_port BETWEEN 1 AND 65535),  -- NULL = 25 none, 587 starttls, 465 tls
    smtp_security TEXT NOT NULL DEFAULT 'starttls' CHECK (smtp_security IN ('none', 'starttls', 'tls')),
    smtp_username TEXT,                             -- NULL = no log-in
    smtp_password TEXT,

    -- The confirmation.
    confirmation_envelope_from TEXT                 -- MAIL FROM; NULL = <>, which some relays refuse
        CHECK (confirmation_envelope_from NOT GLOB '*[^!-~]*'
               AND confirmation_envelope_from NOT GLOB '*[<>(),;:"\]*'),
    -- Its text: plain, {reference} stands for T-XXXX-XXXX.
    template TEXT NOT NULL DEFAULT 'Hello,

we have received your message and opened a ticket for it.

Your reference: {reference}

To add something, just reply to this mail.
',
    confirmations_per_address_hour INTEGER NOT NULL DEFAULT 3 CHECK (confirmations_per_address_hour >= 0),
    confirmations_per_address_day INTEGER NOT NULL DEFAULT 10 CHECK (confirmations_per_address_day >= 0),
    confirmations_per_hour INTEGER NOT NULL DEFAULT 200 CHECK (confirmations_per_hour >= 0),

    -- Addresses, separated by commas, that forward to us: a group, a mailbox with a forwarding rule.
    -- The List-Id or `Auto-Submitted: auto-generated` that they stamp on a person's mail does not count.
    trusted_forwarders TEXT,                        -- NULL = none

    CHECK (previous_secret IS NULL OR previous_secret_until IS NOT NULL),
    CHECK (smtp_security <> 'none' OR smtp_username IS NULL)  -- no password goes over plain text
) STRICT;
CREATE UNIQUE INDEX email_account_default ON email_account (is_default) WHERE is_default;  -- at most one
CREATE TRIGGER email_account_default BEFORE UPDATE OF is_default ON email_account WHEN NEW.is_default BEGIN
    UPDATE email_account SET is_default = 0 WHERE id <> NEW.id;  -- a new default replaces the old one
END;

-- Known: who posts how, what tells a machine, what a command does. Data, not code: a row more is one more ---

CREATE TABLE provider (
    -- How a provider's post is recognised, and where in it the mail is. The first row that fits is taken.
    -- marks, all of which a post has to bear: `path` is there, `path{}` is an object, `path[]` a list, `path~`
    -- text, `path=value`; `a|b` either, `!path` not. A path goes through JSON text too: `envelope.from`.
    id INTEGER PRIMARY KEY,                         -- order
    name TEXT NOT NULL,
    marks TEXT NOT NULL,
    fields TEXT,                                    -- canonical field=path, `field` alone: of the same name, with
                                                    -- a capital: a header; `a|b` first that is there, `a+b` both;
                                                    -- raw: the whole mail, read instead. NULL = no mail in it
    members TEXT,                                   -- of a batch: path of the list; NULL = one mail a post
    member_marks TEXT NOT NULL DEFAULT '',          -- which of the members are mail; '' = all
    member TEXT NOT NULL DEFAULT '',                -- path of the mail in a member; '' = itself
    answer TEXT                                     -- fields NULL: what to say; NULL = there is mail in it
        CHECK ((fields IS NULL) = (answer IS NOT NULL)),
    status INTEGER                                  -- fields NULL: 200 ignored, 202 ignored but kept for the
        CHECK (status IN (200, 202, 422))           -- admin (answered 200), 422 what the sender should do
) STRICT;
INSERT INTO provider (name, marks, status, answer) VALUES
    ('Amazon SES', 'TopicArn Type=SubscriptionConfirmation !message_id', 202,
     'an SNS subscription: open the SubscribeURL that `inbound rejected show` prints, to confirm it'),
    ('Amazon SES', 'TopicArn Type !message_id', 200,
     'an SNS notice, no mail'),
    ('Amazon SES', 'notificationType !notificationType=Received !message_id', 200,
     'an SES notice, no mail'),
    ('SocketLabs', 'SecretKey Type !message_id', 200,
     'a SocketLabs validation or event, no mail'),
    ('Mailgun', 'event-data !message_id', 200,
     'a Mailgun event, no mail'),
    ('Postmark', 'RecordType MessageID !message_id', 200,
     'a Postmark event, no mail'),
    ('Resend', 'type=email.received data.email_id', 422,
     'Resend posts neither text nor headers: have the mail itself forwarded, to `inbound relay` or '
     || 'another provider'),
    ('Amazon SES', 'notificationType=Received !content', 422,
     'this SES notice has no `content`: use an SNS action, not S3, in the receipt rule');
INSERT INTO provider (name, marks, fields, members, member_marks, member) VALUES
    -- Mandrill. Requires: an inbound domain. Authenticates by: ?secret=. Answers: 200, else tried again.
    -- Configure: Inbound › Domains › Routes. It probes the URL with HEAD first.
    ('Mandrill', 'mandrill_events',
     'from=from_email from_name to cc subject text html headers raw=raw_msg '
     || 'attachments=attachments+images spam=spam_report.score',
     'mandrill_events', 'event=inbound|!event !type', 'msg'),
    -- Mailgun. Requires: a route. Authenticates by: ?secret=. Answers: 200; 406 is final, all else tried
    -- again for 8 h. Configure: Receiving › Routes › forward(). A URL ending in `mime` posts the whole mail.
    ('Mailgun', 'timestamp token signature body-mime|message-headers',
     'envelope=sender from To subject text=body-plain html=body-html headers=message-headers '
     || 'message_id=Message-Id raw=body-mime attachments=files|attachments',
     NULL, '', ''),
    -- SendGrid. Requires: Inbound Parse. Authenticates by: ?secret= or Basic. Answers: 2xx; 5xx is tried
    -- again for 3 days, 4xx is final. Configure: Settings › Inbound Parse, raw or parsed.
    ('SendGrid', 'envelope~ headers~|email !message_id',
     'envelope=envelope.from from to cc subject text html headers raw=email attachments=files '
     || 'spam=spam_score',
     NULL, '', ''),
    -- CloudMailin. Requires: an address. Authenticates by: Basic or ?secret=. Answers: 2xx; 4xx bounces
    -- the mail, 5xx lets the sender's server try again. Configure: the target, in any format.
    ('CloudMailin', 'envelope{} headers{}|message !from !text !message_id',
     'envelope=envelope.from headers text=plain html raw=message attachments=files|attachments '
     || 'spam=envelope.spamd.score',
     NULL, '', ''),
    -- Postal. Requires: an HTTP endpoint. Authenticates by: ?secret= or Basic. Answers: 2xx; 4xx bounces,
    -- 5xx is tried again. Configure: Routing › HTTP endpoints. What strip_replies cut off is put back.
    ('Postal', 'rcpt_to mail_from plain_body|html_body|message',
     'envelope=mail_from from to cc subject text=plain_body+replies_from_plain_body html=html_body '
     || 'message_id in_reply_to references attachments raw=message Auto-Submitted=auto_submitted '
     || 'X-Postal-Bounce=bounce Date=date spam=spam_status',
     NULL, '', ''),
    -- SparkPost. Requires: a relay webhook. Authenticates by: ?secret=, Basic or a custom header.
    -- Answers: 200, else tried again. Configure: POST /api/v1/relay-webhooks, the URL as its target.
    ('SparkPost', 'events.0.msys{}|events.1.msys{}',
     'envelope=msg_from raw=content.email_rfc822 subject=content.subject text=content.text '
     || 'html=content.html headers=content.headers to=content.to cc=content.cc',
     'events', 'msys.relay_message|!msys', 'msys.relay_message'),
    -- Amazon SES. Requires: a receipt rule whose SNS action carries the mail (150 KB at most).
    -- Authenticates by: ?secret= or Basic. Answers: 200; 5xx is tried again. Configure: an HTTPS
    -- subscription, then open the SubscribeURL that `inbound rejected` shows.
    ('Amazon SES', 'notificationType=Received content',
     'envelope=mail.source raw=content spam=receipt.spamVerdict.status+receipt.dmarcVerdict.status',
     NULL, '', ''),
    -- SocketLabs. Requires: `account set validation_key=…`, and its Secret Key set as our secret.
    -- Authenticates by: SecretKey in the body. Answers: 200, always with the Validation Key.
    -- Configure: Inbound API › the URL as it is.
    ('SocketLabs', 'Message{} InboundMailFrom',
     'envelope=InboundMailFrom from=Message.From to=Message.To cc=Message.Cc|Message.CC '
     || 'subject=Message.Subject text=Message.TextBody html=Message.HtmlBody '
     || 'headers=Message.CustomHeaders message_id=Message.MessageId spam=SpamScore '
     || 'attachments=Message.Attachments+Message.EmbeddedMedia',
     NULL, '', ''),
    -- Postmark. Requires: an inbound stream. Authenticates by: ?secret= or Basic. Answers: 200; all but
    -- 403 is tried again for 10 h. Configure: the stream's webhook. MessageID is Postmark's own.
    ('Postmark', 'FromFull{} Headers[]',
     'envelope=Headers from=FromFull to=ToFull cc=CcFull subject=Subject text=TextBody html=HtmlBody '
     || 'headers=Headers attachments=Attachments raw=RawEmail',
     NULL, '', ''),
    -- Brevo. Requires: inbound parsing. Authenticates by: ?secret=, Basic or a header. Answers: 2xx; 4xx
    -- is final. Configure: POST /v3/webhooks, type inbound. Of attachments only the names are posted.
    ('Brevo', 'items.0.Uuid|items.1.Uuid',
     'from=From to=To cc=Cc subject=Subject text=RawTextBody html=RawHtmlBody headers=Headers '
     || 'message_id=MessageId in_reply_to=InReplyTo attachments=Attachments spam=SpamScore',
     'items', '', ''),
    -- Mailjet. Requires: the Parse API. Authenticates by: ?secret= or Basic. Answers: 200, else tried
    -- again. Configure: POST /v3/REST/parseroute with the Url.
    ('Mailjet', 'Headers{} Sender Recipient',
     'envelope=Sender from=From subject=Subject text=Text-part html=Html-part headers=Headers '
     || 'attachments=Parts spam=SpamAssassinScore',
     NULL, '', ''),
    -- MailerSend. Requires: an inbound route. Authenticates by: ?secret=. Answers: 2xx within 3 s; all
    -- else is final. Configure: the route's POST URL. data.id is MailerSend's own.
    ('MailerSend', 'type=inbound.message',
     'envelope=data.sender.email raw=data.raw from=data.from subject=data.subject text=data.text '
     || 'html=data.html headers=data.headers attachments=data.attachments to=data.recipients.to.data',
     NULL, '', ''),
    -- Forward Email. Requires: a webhook as an alias's recipient. Authenticates by: ?secret=. Answers:
    -- exactly 200. Configure: the alias.
    ('Forward Email', 'headerLines[] session{}',
     'envelope=session.sender from=from.value to=to.value cc=cc.value subject text html '
     || 'message_id=messageId in_reply_to=inReplyTo references attachments headers=headerLines',
     NULL, '', '');

CREATE TABLE command (
    -- What `inbound` does where a single statement does it. usage: a word in capitals is the parameter of
    -- that name in lower case, [one in brackets] may be left out. Further parameters: :account (row of
    -- --account), :now, :until (now + --keep), :token (a new random secret).
    usage TEXT PRIMARY KEY,
    statement TEXT NOT NULL                         -- what it returns is printed
) STRICT;
INSERT INTO command (usage, statement) VALUES
    ('secret [show]', 'SELECT * FROM secret WHERE id = :account'),
    ('secret set VALUE', 'UPDATE email_account SET inbound_secret = :value, previous_secret = NULL
      WHERE id = :account RETURNING address, inbound_secret'),
    ('secret rotate', 'UPDATE email_account SET previous_secret = inbound_secret, previous_secret_until = :until,
      inbound_secret = :token WHERE id = :account
      RETURNING address, inbound_secret, previous_secret, previous_secret_until'),
    ('account [show]', 'SELECT * FROM account WHERE id = :account'),
    ('account add ADDRESS', 'INSERT INTO email_account (address, queue, inbound_secret)
      SELECT :address, id, :token FROM queue WHERE is_default RETURNING address, inbound_secret'),
    ('tickets', 'SELECT * FROM tickets'),
    ('close REF', 'UPDATE ticket SET status = ''closed'', updated_at = :now WHERE reference = upper(:ref)
      RETURNING reference, status'),
    ('outbox [list]', 'SELECT * FROM mail_out'),
    ('outbox show ID', 'SELECT * FROM mail_out_whole WHERE id = :id'),
    ('outbox retry ID', 'UPDATE outbox SET state = ''queued'', next_attempt_at = :now, give_up_at = :now + 86400
      WHERE id = :id AND (state IN (''queued'', ''failed'') OR state = ''sending'' AND next_attempt_at <= :now)
      RETURNING id, state'),
    ('rejected [list]', 'SELECT * FROM mail_refused'),
    ('rejected show ID', 'SELECT * FROM mail_refused_whole WHERE id = :id'),
    ('rejected delete ID', 'DELETE FROM rejected WHERE id = :id RETURNING id, reason');

CREATE TABLE sign (
    -- What tells a machine's mail from a person's. The first row whose tests hold decides; none: human.
    -- A test is names and a pattern (a regular expression, any case) that matches one value whole. A name
    -- is a header, whose values count without comments and parameters (RFC 3834 5.1); `raw-` and a header:
    -- the values as they are; `top-` and a header: the first, which our own server put there; `from` and
    -- `envelope`: local part of From and MAIL FROM (`<>` = null sender); `subject`; `part`: the attachments'
    -- types; `verdict`: the provider's on spam; `weak`: the reasons of the rows of that kind that hold.
    -- Kind weak is no verdict by itself. Kind withhold forbids the confirmation of a person's mail. Kind
    -- forwarded only says where a trusted forwarder names itself; its pattern is not looked at.
    id INTEGER PRIMARY KEY,                         -- order
    kind TEXT NOT NULL CHECK (kind IN (
        'auto-reply', 'bounce', 'machine', 'list', 'bulk', 'weak', 'withhold', 'forwarded')),
    names TEXT NOT NULL,
    pattern TEXT NOT NULL,
    and_names TEXT,                                 -- a second test that has to hold too; NULL = none
    and_pattern TEXT,
    reason TEXT NOT NULL,                           -- in words, with the source
    CHECK ((and_names IS NULL) = (and_pattern IS NULL))
) STRICT;
INSERT INTO sign (kind, names, pattern, and_names, and_pattern, reason) VALUES
    ('bounce', 'raw-content-type',
     'multipart/report.*delivery-status.*', NULL, NULL,
     'a delivery status report (RFC 3464 2)'),
    ('bounce', 'raw-content-type',
     'multipart/report.*feedback-report.*', NULL, NULL,
     'an abuse report (RFC 5965)'),
    ('bounce', 'raw-content-type',
     'multipart/report.*disposition-notification.*', 'raw-auto-submitted', '.*rejected.*',
     'a refusal in the form of a receipt (RFC 5429)'),
    ('auto-reply', 'raw-content-type',
     'multipart/report.*disposition-notification.*', NULL, NULL,
     'a receipt (RFC 8098 2)'),
    ('bounce', 'x-failed-recipients', '.+', NULL, NULL, 'X-Failed-Recipients (Exim, Gmail)'),
    ('auto-reply', 'auto-submitted',
     '(?!(?:no|auto-generated|auto-notified)$).+', NULL, NULL,
     'Auto-Submitted (RFC 3834 5.2)'),
    ('auto-reply', 'x-autoreply x-auto-reply x-autorespond x-autoresponder x-autoresponse x-autoreply-from '
     || 'x-mail-autoreply x-vacation',
     '(?!(?:no|false|0)$).+', NULL, NULL,
     'an autoresponder''s own header'),
    ('auto-reply', 'precedence x-precedence preference', 'auto_reply', NULL, NULL, 'Precedence: auto_reply'),
    ('auto-reply', 'x-autogenerated', 'reply', NULL, NULL, 'X-Autogenerated: reply (Communigate)'),
    ('auto-reply', 'x-fc-machinegenerated', 'true', NULL, NULL, 'X-FC-MachineGenerated (FirstClass)'),
    ('auto-reply', 'x-post-messageclass raw-x-post-messageclass', '.*autoresponder.*|9', NULL, NULL,
     'X-POST-MessageClass (Mailtraq)'),
    ('auto-reply', 'delivered-to', 'autoresponder', NULL, NULL, 'Delivered-To: Autoresponder (qmail)'),
    ('auto-reply', 'x-apple-action', 'vacation.*', NULL, NULL, 'X-Apple-Action: VACATION (iCloud)'),
    ('auto-reply', 'x-ms-exchange-generated-message-source',
     'mailbox rules agent', NULL, NULL,
     'Exchange''s Mailbox Rules Agent'),
    ('auto-reply', 'x-ms-exchange-inbox-rules-loop',
     '.+', 'raw-x-auto-response-suppress', '(?:.*[,;\s])?(?:all|autoreply)(?:[,;\s].*)?',
     'an Exchange rule that wants no answer'),
    ('auto-reply', 'x-ms-exchange-inbox-rules-loop',
     '.+', 'auto-submitted', '(?!no$).+',
     'an Exchange rule''s own mail'),
    ('auto-reply', 'subject',
     '(?:\[[^\]]*\]\s*|(?:re|aw|sv|antwort):\s*)*(?:(?:automatic reply|auto(?:matic)?[- ]?(?:reply|response)|out of '
     || '(?:the )?office(?: autoreply| reply)?|abwesenheitsnotiz|automatische antwort|réponse automatique|absence du '
     || 'bureau|respuesta automática|resposta automática|automatiskt? svar|automatisch antwoord|frånvaro|fuori sede|'
     || 'risposta automatica|automatická odpověď|automaattinen vastaus|автоматический ответ|automatikus válasz|'
     || 'automatyczna odpowiedź|自動応答|自动回复|自動回覆)\s*(?:[:：].*|$)|auto\s*[:：].*)'
     || '|.* is out of the office(?:\.| until .*| ?\(returning.*)?', NULL, NULL,
     'the subject of a vacation notice'),
    ('bounce', 'from', 'mailer-daemon|mail-daemon|mdaemon', NULL, NULL, 'From is a mailer daemon'),
    ('bounce', 'envelope',
     'mailer-daemon|mail-daemon|mdaemon', NULL, NULL,
     'the envelope sender is a mailer daemon (RFC 3834 7)'),
    ('bounce', 'x-postal-bounce', 'true|1', NULL, NULL, 'Postal takes it for a bounce'),
    ('bounce', 'part', 'message/delivery-status', 'weak', '.+', 'it carries a delivery status'),
    ('bounce', 'from', 'post[-_.]?master', 'weak', '.+', 'postmaster, and a sign of a bounce'),
    ('bounce', 'envelope', '<>', NULL, NULL, 'a null envelope sender (RFC 5321 4.5.5)'),
    ('machine', 'auto-submitted',
     'auto-generated|auto-notified', NULL, NULL,
     'Auto-Submitted: nobody typed it (RFC 3834 5.1)'),
    ('machine', 'x-ms-exchange-generated-message-source', '.+', NULL, NULL, 'made by an Exchange agent'),
    ('list', 'precedence x-precedence', 'list', NULL, NULL, 'Precedence: list (RFC 3834 2)'),
    ('list', 'list-id list-post list-owner list-archive list-help list-subscribe mailing-list x-beenthere '
     || 'x-mailman-version',
     '.*', NULL, NULL,
     'a mailing list''s header (RFC 2919, RFC 5230 4.6)'),
    ('bulk', 'precedence x-precedence', '(?:bulk|junk)\b.*', NULL, NULL, 'Precedence: bulk or junk (RFC 3834 2)'),
    ('bulk', 'list-unsubscribe list-unsubscribe-post feedback-id x-campaignid x-csa-complaints',
     '.*', NULL, NULL,
     'a mass mailing''s header'),
    -- `Fwd:` is what a person puts before the bounce that he asks us about.
    ('weak', 'subject', '(?!\s*(?:fwd?|wg|tr|rv|enc|i):).*(?:undeliver|returned mail|failure notice|'
     || 'delivery (?:status notification|failure|has failed|incomplete)|mail delivery (?:failed|failure|system)|'
     || 'unzustellbar|non remis).*', NULL, NULL,
     'the subject of a bounce'),
    ('weak', 'envelope', '<>|mailer-daemon|mail-daemon|mdaemon', NULL, NULL, 'a null or a daemon''s envelope'),
    ('weak', 'auto-submitted', '(?!no$).+', NULL, NULL, 'Auto-Submitted'),
    ('forwarded', 'raw-x-ms-exchange-inbox-rules-loop raw-resent-from raw-x-forwarded-for raw-x-forwarded-to',
     '', NULL, NULL, 'a forwarder''s own header'),
    ('withhold', 'envelope', '<>', NULL, NULL, 'the envelope sender is null (RFC 3834 2)'),
    -- RFC 3834 2, RFC 5230 4.6. prvs= and srs0= are rewritten envelopes, no one's mailbox.
    ('withhold', 'from',
     'mailer-?daemon|mail-daemon|mdaemon|post[-_.]?master|.*noreply.*|(?:.*[-_.+])?no[-_.]repl(?:y|ies).*|'
     || '.*do[-_.]?not[-_.]?reply.*|no[-_.]?respond.*|auto[-_.]?(?:reply|responder)|nobody|abuse|root|listserv|'
     || 'majordomo|mailman|owner-.+|.+-owner|.+-request|.+-bounces?|bounces?(?:[+=-].*)?|'
     || '(?:prvs|srs[01])=.*',
     NULL, NULL, 'From is an address that is never answered'),
    ('withhold', 'path', 'owner-.+|.+-owner|.+-request|.+-bounces?|bounces?(?:[+=-].*)?|.*noreply.*|'
     || '(?:.*[-_.+])?no[-_.]reply.*', NULL, NULL, 'the envelope sender is one that is never answered (RFC 3834 7)'),
    -- Not the envelope sender, which only the first header can tell; but nobody writes `<>` for nothing.
    ('withhold', 'raw-return-path', '<>', NULL, NULL, 'Return-Path is null (RFC 3834 2)'),
    ('withhold', 'x-loop x-auto-generated',
     '(?:yes|true|hd-.*)', NULL, NULL, 'another helpdesk marks its mail so'),
    ('withhold', 'x-rt-loop-prevention x-roundup-loop x-otrs-loop', '.*', NULL, NULL, 'another helpdesk''s own mail'),
    ('withhold', 'raw-x-auto-response-suppress', '(?:.*[,;\s])?(?:all|autoreply)(?:[,;\s].*)?', NULL, NULL,
     'X-Auto-Response-Suppress asks for none (MS-OXCMAIL 2.1.3.2.20)'),
    ('withhold', 'verdict top-x-spam-flag top-x-spam-status top-x-mailgun-sflag',
     '(?s:(?:.*\n)?\s*(?:(?:fail|spam|yes)\b.*|(?:[5-9]|\d\d+)(?:\.\d+)?\s*))', NULL, NULL,
     'the provider takes it for spam'),
    ('withhold', 'top-authentication-results', '.*\bdmarc\s*=\s*fail.*', NULL, NULL,
     'From may be forged, DMARC failed (RFC 8601 5)');

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
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL                     -- of the last message or change of status
) STRICT;

CREATE TRIGGER ticket_delete AFTER DELETE ON ticket BEGIN  -- also in a shell that has foreign keys off
    DELETE FROM message WHERE ticket = OLD.id;
END;

CREATE TABLE message (
    id INTEGER PRIMARY KEY,
    ticket INTEGER NOT NULL REFERENCES ticket ON DELETE CASCADE,
    email_account INTEGER NOT NULL REFERENCES email_account,
    direction TEXT NOT NULL CHECK (direction IN ('in', 'out')),
    message_id TEXT NOT NULL,                       -- as written, or <…@missing.invalid> made of the content
    digest TEXT NOT NULL,                           -- SHA-256, hex, of what the sender wrote; '' = direction out
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
CREATE TRIGGER message_ticket AFTER INSERT ON message BEGIN  -- a person's message opens its ticket again
    UPDATE ticket SET updated_at = NEW.received_at, status = iif(NEW.kind = 'human', 'open', status)
    WHERE id = NEW.ticket;
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
    -- sent → failed (a bounce came back)      failed → queued (`outbox retry`)
    id INTEGER PRIMARY KEY,
    message INTEGER NOT NULL UNIQUE REFERENCES message ON DELETE CASCADE,
    email_account INTEGER NOT NULL REFERENCES email_account,
    purpose TEXT NOT NULL CHECK (purpose IN ('confirmation', 'reply')),
    recipient TEXT NOT NULL,                        -- the one RCPT TO
    mailbox TEXT NOT NULL,                          -- recipient in lower case without +tag: what the caps count
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
CREATE INDEX outbox_state ON outbox (state, next_attempt_at);                    -- claim; trouble
CREATE INDEX outbox_mailbox ON outbox (mailbox, purpose, created_at);            -- caps to one address
CREATE INDEX outbox_account ON outbox (email_account, purpose, created_at);      -- cap in all

CREATE TABLE rejected (
    -- Posts that proved the secret and could not become a message. `rejected replay` tries them again.
    id INTEGER PRIMARY KEY,
    received_at INTEGER NOT NULL,                   -- of the last try
    email_account INTEGER REFERENCES email_account ON DELETE SET NULL,
    status INTEGER NOT NULL,                        -- the HTTP status that it was answered with
    reason TEXT NOT NULL,                           -- one sentence
    content_type TEXT NOT NULL,                     -- header of the request, with its parameters
    body BLOB NOT NULL,                             -- as posted, but the secret's own bytes are starred out
    body_sha256 TEXT NOT NULL,                      -- of body, hex; the same body again updates its row
    tries INTEGER NOT NULL DEFAULT 1,               -- how often it was posted unchanged
    UNIQUE (email_account, body_sha256)
) STRICT;

CREATE TRIGGER rejected_again BEFORE INSERT ON rejected WHEN EXISTS (SELECT 1 FROM rejected
    WHERE email_account IS NEW.email_account AND body_sha256 = NEW.body_sha256) BEGIN
    UPDATE rejected SET tries = tries + 1, received_at = NEW.received_at, status = NEW.status, reason = NEW.reason
    WHERE email_account IS NEW.email_account AND body_sha256 = NEW.body_sha256;
    SELECT RAISE(IGNORE);
END;

-- Read ------------------------------------------------------------------------------------------------------

CREATE VIEW account AS                              -- what `inbound account` prints and sets
    SELECT email_account.id, address, display_name, queue.name AS queue, email_account.is_default,
           validation_key, smtp_host, smtp_port, smtp_security, smtp_username,
           iif(smtp_password IS NULL, NULL, '(set)') AS smtp_password,
           confirmation_envelope_from, template, confirmations_per_address_hour, confirmations_per_address_day,
           confirmations_per_hour, trusted_forwarders
    FROM email_account JOIN queue ON queue.id = email_account.queue;

CREATE VIEW valid_secret AS                         -- what callers may present: the current ones first
    SELECT *, inbound_secret AS secret, 9e999 AS until FROM email_account WHERE inbound_secret IS NOT NULL
    UNION ALL
    SELECT *, previous_secret, previous_secret_until FROM email_account WHERE previous_secret IS NOT NULL;

CREATE VIEW secret AS                               -- what `inbound secret` prints
    SELECT id, address, inbound_secret, previous_secret, previous_secret_until FROM email_account;

CREATE VIEW known_id AS                             -- every Message-ID that we received or sent, and its ticket
    SELECT message.email_account, message.message_id, message.id AS message, message.direction, message.digest,
           message.kind, ticket.id, ticket.reference, ticket.requester, ticket.updated_at
    FROM message JOIN ticket ON ticket.id = message.ticket;

CREATE VIEW tickets AS                              -- what `inbound tickets` prints, newest first
    SELECT ticket.reference, queue.name AS queue, ticket.status, ticket.subject, ticket.requester,
           (SELECT count(*) FROM message WHERE message.ticket = ticket.id) AS messages,
           ticket.created_at, ticket.updated_at
    FROM ticket JOIN queue ON queue.id = ticket.queue
    ORDER BY ticket.created_at DESC, ticket.id DESC;
CREATE TRIGGER account_set INSTEAD OF UPDATE ON account BEGIN  -- a queue's name that is new makes one
    INSERT OR IGNORE INTO queue (name) VALUES (NEW.queue);
    UPDATE email_account SET
        address = NEW.address, display_name = NEW.display_name,
        queue = (SELECT id FROM queue WHERE name = NEW.queue), is_default = NEW.is_default,
        validation_key = NEW.validation_key, smtp_host = NEW.smtp_host, smtp_port = NEW.smtp_port,
        smtp_security = NEW.smtp_security, smtp_username = NEW.smtp_username,
        smtp_password = iif(NEW.smtp_password IS '(set)', smtp_password, NEW.smtp_password),
        confirmation_envelope_from = NEW.confirmation_envelope_from, template = NEW.template,
        confirmations_per_address_hour = NEW.confirmations_per_address_hour,
        confirmations_per_address_day = NEW.confirmations_per_address_day,
        confirmations_per_hour = NEW.confirmations_per_hour, trusted_forwarders = NEW.trusted_forwarders
    WHERE id = OLD.id;
END;

CREATE VIEW conversation AS                         -- what `inbound show` prints of each message, oldest first
    SELECT id, ticket, direction, message_id, in_reply_to, "references", from_address AS "from", from_name,
           envelope_from, "to", cc, subject, text, html, headers, kind, reason, confirmation, notes, received_at
    FROM message ORDER BY id;

CREATE VIEW transcript AS                           -- the same to read, a text for each message
    SELECT ticket, char(10) || '--- ' || direction || ' ' || datetime(received_at, 'unixepoch') || ' '
           || from_name || ' <' || from_address || '>' || char(10) || '    ' || ifnull(kind || ': ', '') || reason
           || ifnull((SELECT group_concat(char(10) || '    note: ' || value, '') FROM json_each(notes)), '')
           || ifnull((SELECT group_concat(char(10) || '    attached: ' || filename || ' (' || content_type || ', '
                      || size || ' bytes) ' || note, '') FROM attachment WHERE message = message.id), '')
           || char(10, 10) || rtrim(text, char(10)) AS words
    FROM message ORDER BY id;

CREATE VIEW inbox AS                                -- open tickets, newest first, readable times (UTC)
    SELECT reference, queue, subject, requester, messages,
           datetime(created_at, 'unixepoch') AS created, datetime(updated_at, 'unixepoch') AS updated
    FROM tickets WHERE status = 'open';

CREATE VIEW mail_out AS                             -- what `inbound outbox` prints, oldest first
    SELECT outbox.id, ticket.reference AS ticket, outbox.recipient AS "to", outbox.state, outbox.attempts,
           outbox.next_attempt_at, outbox.last_error
    FROM outbox JOIN message ON message.id = outbox.message JOIN ticket ON ticket.id = message.ticket
    ORDER BY outbox.id;

CREATE VIEW mail_out_whole AS                       -- what `inbound outbox show` prints
    SELECT mail_out.*, outbox.content FROM mail_out JOIN outbox ON outbox.id = mail_out.id;

CREATE VIEW mail_refused AS                         -- what `inbound rejected` prints, oldest first
    SELECT id, received_at, status, reason, content_type, length(body) AS size FROM rejected ORDER BY id;

CREATE VIEW mail_refused_whole AS                   -- what `inbound rejected show` prints
    SELECT mail_refused.*, rejected.tries, rejected.body
    FROM mail_refused JOIN rejected ON rejected.id = mail_refused.id;

CREATE VIEW trouble AS                              -- what /healthz and `inbound doctor` say of the database
    SELECT 1 AS is_urgent, 'no secret is set: run `inbound secret rotate`' AS words  -- urgent: mail stands still
    WHERE NOT EXISTS (SELECT 1 FROM email_account WHERE inbound_secret IS NOT NULL)
    UNION ALL
    SELECT 1, 'the outbox waits since ' || datetime(head, 'unixepoch') || ' UTC: run `inbound outbox`'
    FROM (SELECT min(created_at) AS head FROM outbox WHERE state IN ('queued', 'sending'))
    WHERE head < CAST(strftime('%s', 'now') AS INTEGER) - 3600
    UNION ALL
    SELECT 0, n || ' rejected posts are waiting: run `inbound rejected`'
    FROM (SELECT count(*) AS n FROM rejected) WHERE n > 0
    UNION ALL
    SELECT 0, n || ' mails could not be sent: run `inbound outbox`'
    FROM (SELECT count(*) AS n FROM outbox WHERE state = 'failed') WHERE n > 0;

INSERT INTO queue (name, is_default) VALUES ('Support', 1), ('Automatic', 0);
INSERT INTO email_account (address, queue, is_default) SELECT 'support@localhost', id, 1 FROM queue WHERE is_default;
