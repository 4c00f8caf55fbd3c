PRAGMA application_id = 1768841828;
PRAGMA user_version = 3;
BEGIN TRANSACTION;
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
INSERT INTO "attachment" VALUES(1,1,'smoke.txt','text/plain','',5,'04d588cb41b8022d1233924f0fe8280d9e2bb92cdc81658eb102ef9c42fc9452',X'736D6F6B65','');
INSERT INTO "attachment" VALUES(2,1,'broken.bin','application/octet-stream','',0,NULL,NULL,'not kept: its content is not posted, or broken');
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
INSERT INTO "email_account" VALUES(1,'support@helpdesk.example','Help',1,1,'a-secret-of-the-tests-0123456789','the-secret-before-0123456789',1790086400,NULL,NULL,NULL,NULL,'starttls',NULL,NULL,NULL,'Thank you. {reference}
',3,10,30,150,'info@helpdesk.example','bob@team.example,cleo@team.example',1,NULL);
INSERT INTO "email_account" VALUES(2,'sales@helpdesk.example','Support',3,0,'the-secret-of-sales-0123456789',NULL,NULL,NULL,NULL,NULL,NULL,'starttls',NULL,NULL,NULL,'Hello,

we have received your message and opened a ticket for it.

Your reference: {reference}

To add something, just reply to this mail.
',3,10,30,200,NULL,NULL,60,NULL);
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
INSERT INTO "message" VALUES(1,1,1,'in','<first@customer.example>','4554920f5e7240da3197e5aa73a38a23f5c235af6fc6459dcdaf44405531a43b',NULL,'[]','ada@customer.example','Ada Lovelace',NULL,'[]','[]','Printer on fire','It burns.',NULL,'[]','human','no sign of automatic mail; no id of a known message, so a new ticket; confirmation queued','queued','[]',1790000000);
INSERT INTO "message" VALUES(2,1,1,'out','<a26e8f08ad93a94c84ac2fb80e155ab0@helpdesk.example>','','<first@customer.example>','["<first@customer.example>"]','support@helpdesk.example','Help','','["ada@customer.example"]','[]','[T-X8HS-QT09] We received your message','Thank you. T-X8HS-QT09
',NULL,'[["From", "Help <support@helpdesk.example>"], ["To", "ada@customer.example"], ["Subject", "[T-X8HS-QT09] We received your message"], ["Date", "Mon, 21 Sep 2026 14:13:20 -0000"], ["Message-ID", "<a26e8f08ad93a94c84ac2fb80e155ab0@helpdesk.example>"], ["In-Reply-To", "<first@customer.example>"], ["References", "<first@customer.example>"], ["Auto-Submitted", "auto-replied"], ["X-Auto-Response-Suppress", "All"], ["Precedence", "bulk"], ["Content-Type", "text/plain; charset=\"utf-8\""], ["Content-Transfer-Encoding", "quoted-printable"], ["MIME-Version", "1.0"]]',NULL,'our confirmation',NULL,'[]',1790000000);
INSERT INTO "message" VALUES(3,1,1,'out','<7e6cc2aa38505c26a9c2704fc0dcbb94@helpdesk.example>','','<first@customer.example>','["<first@customer.example>"]','support@helpdesk.example','Help','support@helpdesk.example','["ada@customer.example"]','[]','[T-X8HS-QT09] Re: Printer on fire','Pull the plug.
',NULL,'[["From", "Help <support@helpdesk.example>"], ["To", "ada@customer.example"], ["Subject", "[T-X8HS-QT09] Re: Printer on fire"], ["Date", "Mon, 21 Sep 2026 14:14:20 -0000"], ["Message-ID", "<7e6cc2aa38505c26a9c2704fc0dcbb94@helpdesk.example>"], ["In-Reply-To", "<first@customer.example>"], ["References", "<first@customer.example>"], ["Content-Type", "text/plain; charset=\"utf-8\""], ["Content-Transfer-Encoding", "quoted-printable"], ["MIME-Version", "1.0"]]',NULL,'our reply',NULL,'[]',1790000060);
INSERT INTO "message" VALUES(4,1,1,'in','<vacation@customer.example>','8f7bdf52d2275d85291e493d755d77a52f76b15c6bdc9a907f5d1a2d4bb4cfd7','<first@customer.example>','[]','ada@customer.example','Ada Lovelace',NULL,'[]','[]','Printer on fire','I am away.',NULL,'[["Auto-Submitted", "auto-replied"]]','auto-reply','Auto-Submitted (RFC 3834 5.2); In-Reply-To names a message of this ticket; no confirmation: it opened no ticket','not due','[]',1790000120);
INSERT INTO "message" VALUES(5,2,1,'in','<20261079.09708@qmail.customer.example>','318e78db29b5fe3d77d800ccf8bf2c347609284370894000c56ccee3b9b72ba3',NULL,'[]','MAILER-DAEMON@qmail.customer.example','','','["support@helpdesk.example"]','[]','failure notice','Hi. This is the program at qmail.customer.example. <bob@customer.example>: no mailbox here by that name.
',NULL,'[["Return-Path", "<>"], ["Received", "from mx.qmail.customer.example (mx.qmail.customer.example [192.0.2.179]) by mail.helpdesk.example with ESMTPS id 29BA for <support@helpdesk.example>; Wed, 16 Sep 2026 23:49:11 +0200"], ["From", "MAILER-DAEMON@qmail.customer.example"], ["To", "support@helpdesk.example"], ["Subject", "failure notice"], ["Date", "Wed, 16 Sep 2026 23:49:11 +0200"], ["Message-ID", "<20261079.09708@qmail.customer.example>"]]','bounce','From is a mailer daemon; no id of a known message, so a new ticket; confirmation withheld: never for bounce mail (RFC 3834 2)','withheld','[]',1790000180);
INSERT INTO "message" VALUES(6,3,1,'in','<fourth@customer.example>','e5a1e2e6161225f01a98a9722419411bb41f19cd45e1f5039444c8f2ae430f9c',NULL,'[]','grace@customer.example','Grace Hopper',NULL,'[]','[]','日本語 ünd','Ein Käfer.',NULL,'[]','human','no sign of automatic mail; no id of a known message, so a new ticket; confirmation queued','queued','[]',1790000180);
INSERT INTO "message" VALUES(7,3,1,'out','<abe2cb2c3c4eaf534f645d76802c6235@helpdesk.example>','','<fourth@customer.example>','["<fourth@customer.example>"]','support@helpdesk.example','Help','','["grace@customer.example"]','[]','[T-Z9KV-SFBB] We received your message','Thank you. T-Z9KV-SFBB
',NULL,'[["From", "Help <support@helpdesk.example>"], ["To", "grace@customer.example"], ["Subject", "[T-Z9KV-SFBB] We received your message"], ["Date", "Mon, 21 Sep 2026 14:16:20 -0000"], ["Message-ID", "<abe2cb2c3c4eaf534f645d76802c6235@helpdesk.example>"], ["In-Reply-To", "<fourth@customer.example>"], ["References", "<fourth@customer.example>"], ["Auto-Submitted", "auto-replied"], ["X-Auto-Response-Suppress", "All"], ["Precedence", "bulk"], ["Content-Type", "text/plain; charset=\"utf-8\""], ["Content-Transfer-Encoding", "quoted-printable"], ["MIME-Version", "1.0"]]',NULL,'our confirmation',NULL,'[]',1790000180);
INSERT INTO "message" VALUES(8,4,1,'in','<fifth@elsewhere.example>','f5a6a605ed10339d74c04483a1e98c2ce8e861d5b36a063dabf5f503143a44fe',NULL,'[]','bob@elsewhere.example','',NULL,'[]','[]','Again','Broken.',NULL,'[]','human','no sign of automatic mail; no id of a known message, so a new ticket; confirmation queued','queued','[]',1790000180);
INSERT INTO "message" VALUES(9,4,1,'out','<0f760322bec15f8c330060a7ae9a486c@helpdesk.example>','','<fifth@elsewhere.example>','["<fifth@elsewhere.example>"]','support@helpdesk.example','Help','','["bob@elsewhere.example"]','[]','[T-ZA7M-RRZE] We received your message','Thank you. T-ZA7M-RRZE
',NULL,'[["From", "Help <support@helpdesk.example>"], ["To", "bob@elsewhere.example"], ["Subject", "[T-ZA7M-RRZE] We received your message"], ["Date", "Mon, 21 Sep 2026 14:16:20 -0000"], ["Message-ID", "<0f760322bec15f8c330060a7ae9a486c@helpdesk.example>"], ["In-Reply-To", "<fifth@elsewhere.example>"], ["References", "<fifth@elsewhere.example>"], ["Auto-Submitted", "auto-replied"], ["X-Auto-Response-Suppress", "All"], ["Precedence", "bulk"], ["Content-Type", "text/plain; charset=\"utf-8\""], ["Content-Transfer-Encoding", "quoted-printable"], ["MIME-Version", "1.0"]]',NULL,'our confirmation',NULL,'[]',1790000180);
INSERT INTO "message" VALUES(10,4,1,'out','<e27bad13d372500edc20bd512a82daf4@helpdesk.example>','','<fifth@elsewhere.example>','["<fifth@elsewhere.example>"]','support@helpdesk.example','Help','support@helpdesk.example','["bob@elsewhere.example"]','[]','[T-ZA7M-RRZE] Re: Again','Which one?
',NULL,'[["From", "Help <support@helpdesk.example>"], ["To", "bob@elsewhere.example"], ["Subject", "[T-ZA7M-RRZE] Re: Again"], ["Date", "Mon, 21 Sep 2026 14:16:20 -0000"], ["Message-ID", "<e27bad13d372500edc20bd512a82daf4@helpdesk.example>"], ["In-Reply-To", "<fifth@elsewhere.example>"], ["References", "<fifth@elsewhere.example>"], ["Content-Type", "text/plain; charset=\"utf-8\""], ["Content-Transfer-Encoding", "quoted-printable"], ["MIME-Version", "1.0"]]',NULL,'our reply',NULL,'[]',1790000180);
INSERT INTO "message" VALUES(11,4,1,'in','<sixth@elsewhere.example>','6b78c004e60f3668e0f81e2e5a6a6c750000208cca188bc1cda5bc30198000f0','<fifth@elsewhere.example>','[]','bob@elsewhere.example','',NULL,'[]','[]','Re: Again','This one.',NULL,'[]','human','no sign of automatic mail; In-Reply-To names a message of this ticket; no confirmation: it opened no ticket','not due','[]',1790000240);
INSERT INTO "message" VALUES(12,5,1,'in','<eve@customer.example>','51d43f0c326119d62f609e46778c188cf8bd72397db6a93007cffe78c0001436',NULL,'[]','eve@eve.example','',NULL,'[]','[]','subject eve','text eve',NULL,'[]','human','no sign of automatic mail; no id of a known message, so a new ticket; confirmation queued','queued','[]',1790086400);
INSERT INTO "message" VALUES(13,5,1,'out','<071f39bf852dce57c1ac16e875d9ee04@helpdesk.example>','','<eve@customer.example>','["<eve@customer.example>"]','support@helpdesk.example','Help','','["eve@eve.example"]','[]','[T-SD5S-8RM2] We received your message','Thank you. T-SD5S-8RM2
',NULL,'[["From", "Help <support@helpdesk.example>"], ["To", "eve@eve.example"], ["Subject", "[T-SD5S-8RM2] We received your message"], ["Date", "Tue, 22 Sep 2026 14:13:20 -0000"], ["Message-ID", "<071f39bf852dce57c1ac16e875d9ee04@helpdesk.example>"], ["In-Reply-To", "<eve@customer.example>"], ["References", "<eve@customer.example>"], ["Auto-Submitted", "auto-replied"], ["X-Auto-Response-Suppress", "All"], ["Precedence", "bulk"], ["Content-Type", "text/plain; charset=\"utf-8\""], ["Content-Transfer-Encoding", "quoted-printable"], ["MIME-Version", "1.0"]]',NULL,'our confirmation',NULL,'[]',1790086400);
INSERT INTO "message" VALUES(14,6,1,'in','<fay@customer.example>','a2b5526e237444b1f144b5a0ba8ca7645556ea86b21ca5ae2d55f611859d7e58',NULL,'[]','fay@fay.example','',NULL,'[]','[]','subject fay','text fay',NULL,'[]','human','no sign of automatic mail; no id of a known message, so a new ticket; confirmation queued','queued','[]',1790086400);
INSERT INTO "message" VALUES(15,6,1,'out','<385d3bbff4e9a4cc89ce31c9f42cb06d@helpdesk.example>','','<fay@customer.example>','["<fay@customer.example>"]','support@helpdesk.example','Help','','["fay@fay.example"]','[]','[T-WT5Z-J08S] We received your message','Thank you. T-WT5Z-J08S
',NULL,'[["From", "Help <support@helpdesk.example>"], ["To", "fay@fay.example"], ["Subject", "[T-WT5Z-J08S] We received your message"], ["Date", "Tue, 22 Sep 2026 14:13:20 -0000"], ["Message-ID", "<385d3bbff4e9a4cc89ce31c9f42cb06d@helpdesk.example>"], ["In-Reply-To", "<fay@customer.example>"], ["References", "<fay@customer.example>"], ["Auto-Submitted", "auto-replied"], ["X-Auto-Response-Suppress", "All"], ["Precedence", "bulk"], ["Content-Type", "text/plain; charset=\"utf-8\""], ["Content-Transfer-Encoding", "quoted-printable"], ["MIME-Version", "1.0"]]',NULL,'our confirmation',NULL,'[]',1790086400);
INSERT INTO "message" VALUES(16,5,1,'out','<1@team.example>','43f73444bedfb7708cbc60bd867406d1d43b4b642975dda0bec87bf660fb7ead','<da3a5838de6d688da582366b3cb98ab3@helpdesk.example>','[]','bob@team.example','',NULL,'[]','[]','Re: x','Done.',NULL,'[]',NULL,'answer of bob@team.example',NULL,'[]',1790086400);
INSERT INTO "message" VALUES(17,7,1,'in','<EVE@customer.example>','63152ef666583547a02cf322502cb94238a03b355bfefc7c31283079cf6daa8b',NULL,'[]','gus@gus.example','',NULL,'[]','[]','subject gus','text gus',NULL,'[]','human','no sign of automatic mail; no id of a known message, so a new ticket; confirmation queued','queued','[]',1790086400);
INSERT INTO "message" VALUES(18,7,1,'out','<ae7a8f756772ad30b53c698699b6f012@helpdesk.example>','','<EVE@customer.example>','["<EVE@customer.example>"]','support@helpdesk.example','Help','','["gus@gus.example"]','[]','[T-QPHX-S0RT] We received your message','Thank you. T-QPHX-S0RT
',NULL,'[["From", "Help <support@helpdesk.example>"], ["To", "gus@gus.example"], ["Subject", "[T-QPHX-S0RT] We received your message"], ["Date", "Tue, 22 Sep 2026 14:13:20 -0000"], ["Message-ID", "<ae7a8f756772ad30b53c698699b6f012@helpdesk.example>"], ["In-Reply-To", "<EVE@customer.example>"], ["References", "<EVE@customer.example>"], ["Auto-Submitted", "auto-replied"], ["X-Auto-Response-Suppress", "All"], ["Precedence", "bulk"], ["Content-Type", "text/plain; charset=\"utf-8\""], ["Content-Transfer-Encoding", "quoted-printable"], ["MIME-Version", "1.0"]]',NULL,'our confirmation',NULL,'[]',1790086400);
INSERT INTO "message" VALUES(19,8,1,'in','<Eve@Customer.example>','51d43f0c326119d62f609e46778c188cf8bd72397db6a93007cffe78c0001436',NULL,'[]','eve@eve.example','',NULL,'[]','[]','subject eve','text eve',NULL,'[]','human','no sign of automatic mail; no id of a known message, so a new ticket; confirmation queued','queued','[]',1790086400);
INSERT INTO "message" VALUES(20,8,1,'out','<9cd312ef92da47aa1dea8cebf253d685@helpdesk.example>','','<Eve@Customer.example>','["<Eve@Customer.example>"]','support@helpdesk.example','Help','','["eve@eve.example"]','[]','[T-5BCS-K2C8] We received your message','Thank you. T-5BCS-K2C8
',NULL,'[["From", "Help <support@helpdesk.example>"], ["To", "eve@eve.example"], ["Subject", "[T-5BCS-K2C8] We received your message"], ["Date", "Tue, 22 Sep 2026 14:13:20 -0000"], ["Message-ID", "<9cd312ef92da47aa1dea8cebf253d685@helpdesk.example>"], ["In-Reply-To", "<Eve@Customer.example>"], ["References", "<Eve@Customer.example>"], ["Auto-Submitted", "auto-replied"], ["X-Auto-Response-Suppress", "All"], ["Precedence", "bulk"], ["Content-Type", "text/plain; charset=\"utf-8\""], ["Content-Transfer-Encoding", "quoted-printable"], ["MIME-Version", "1.0"]]',NULL,'our confirmation',NULL,'[]',1790086400);
CREATE TABLE outbox (
    -- state     next_attempt_at   means
    -- queued    due time          waits: first try, next try, or for an smtp_host
    -- sending   end of the lease  one courier has it; past that time it is queued again
    -- sent      NULL              the relay answered 250
    -- failed    NULL              5xx, or 24 h without success, or it bounced later; last_error says which
    --
    -- queued → sending → sent | failed | queued (temporary failure, or the lease ran out)
    -- sent → failed (a bounce came back)      failed → queued (`outbox retry`)
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
INSERT INTO "outbox" VALUES(1,2,1,'confirmation','<a26e8f08ad93a94c84ac2fb80e155ab0@helpdesk.example>','ada@customer.example','ada@customer.example','customer.example',X'46726F6D3A2048656C70203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A2061646140637573746F6D65722E6578616D706C650D0A5375626A6563743A205B542D583848532D515430395D20576520726563656976656420796F7572206D6573736167650D0A446174653A204D6F6E2C2032312053657020323032362031343A31333A3230202D303030300D0A4D6573736167652D49443A203C61323665386630386164393361393463383461633266623830653135356162304068656C706465736B2E6578616D706C653E0D0A496E2D5265706C792D546F3A203C666972737440637573746F6D65722E6578616D706C653E0D0A5265666572656E6365733A203C666972737440637573746F6D65722E6578616D706C653E0D0A4175746F2D5375626D69747465643A206175746F2D7265706C6965640D0A582D4175746F2D526573706F6E73652D53757070726573733A20416C6C0D0A507265636564656E63653A2062756C6B0D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A5468616E6B20796F752E20542D583848532D515430390D0A','sent',1,1790000000,NULL,1790086400,'');
INSERT INTO "outbox" VALUES(2,3,1,'reply','<7e6cc2aa38505c26a9c2704fc0dcbb94@helpdesk.example>','ada@customer.example','ada@customer.example','customer.example',X'46726F6D3A2048656C70203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A2061646140637573746F6D65722E6578616D706C650D0A5375626A6563743A205B542D583848532D515430395D2052653A205072696E746572206F6E20666972650D0A446174653A204D6F6E2C2032312053657020323032362031343A31343A3230202D303030300D0A4D6573736167652D49443A203C37653663633261613338353035633236613963323730346663306463626239344068656C706465736B2E6578616D706C653E0D0A496E2D5265706C792D546F3A203C666972737440637573746F6D65722E6578616D706C653E0D0A5265666572656E6365733A203C666972737440637573746F6D65722E6578616D706C653E0D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A50756C6C2074686520706C75672E0D0A','sent',1,1790000060,NULL,1790086460,'');
INSERT INTO "outbox" VALUES(3,7,1,'confirmation','<abe2cb2c3c4eaf534f645d76802c6235@helpdesk.example>','grace@customer.example','grace@customer.example','customer.example',X'46726F6D3A2048656C70203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A20677261636540637573746F6D65722E6578616D706C650D0A5375626A6563743A205B542D5A394B562D534642425D20576520726563656976656420796F7572206D6573736167650D0A446174653A204D6F6E2C2032312053657020323032362031343A31363A3230202D303030300D0A4D6573736167652D49443A203C61626532636232633363346561663533346636343564373638303263363233354068656C706465736B2E6578616D706C653E0D0A496E2D5265706C792D546F3A203C666F7572746840637573746F6D65722E6578616D706C653E0D0A5265666572656E6365733A203C666F7572746840637573746F6D65722E6578616D706C653E0D0A4175746F2D5375626D69747465643A206175746F2D7265706C6965640D0A582D4175746F2D526573706F6E73652D53757070726573733A20416C6C0D0A507265636564656E63653A2062756C6B0D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A5468616E6B20796F752E20542D5A394B562D534642420D0A','failed',0,1790000180,NULL,1790086580,'550 no');
INSERT INTO "outbox" VALUES(4,9,1,'confirmation','<0f760322bec15f8c330060a7ae9a486c@helpdesk.example>','bob@elsewhere.example','bob@elsewhere.example','elsewhere.example',X'46726F6D3A2048656C70203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A20626F6240656C736577686572652E6578616D706C650D0A5375626A6563743A205B542D5A41374D2D52525A455D20576520726563656976656420796F7572206D6573736167650D0A446174653A204D6F6E2C2032312053657020323032362031343A31363A3230202D303030300D0A4D6573736167652D49443A203C30663736303332326265633135663863333330303630613761653961343836634068656C706465736B2E6578616D706C653E0D0A496E2D5265706C792D546F3A203C666966746840656C736577686572652E6578616D706C653E0D0A5265666572656E6365733A203C666966746840656C736577686572652E6578616D706C653E0D0A4175746F2D5375626D69747465643A206175746F2D7265706C6965640D0A582D4175746F2D526573706F6E73652D53757070726573733A20416C6C0D0A507265636564656E63653A2062756C6B0D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A5468616E6B20796F752E20542D5A41374D2D52525A450D0A','queued',0,1790000180,1790000180,1790086580,'');
INSERT INTO "outbox" VALUES(5,10,1,'reply','<e27bad13d372500edc20bd512a82daf4@helpdesk.example>','bob@elsewhere.example','bob@elsewhere.example','elsewhere.example',X'46726F6D3A2048656C70203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A20626F6240656C736577686572652E6578616D706C650D0A5375626A6563743A205B542D5A41374D2D52525A455D2052653A20416761696E0D0A446174653A204D6F6E2C2032312053657020323032362031343A31363A3230202D303030300D0A4D6573736167652D49443A203C65323762616431336433373235303065646332306264353132613832646166344068656C706465736B2E6578616D706C653E0D0A496E2D5265706C792D546F3A203C666966746840656C736577686572652E6578616D706C653E0D0A5265666572656E6365733A203C666966746840656C736577686572652E6578616D706C653E0D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A5768696368206F6E653F0D0A','queued',0,1790000180,1790000180,1790086580,'');
INSERT INTO "outbox" VALUES(6,13,1,'confirmation','<071f39bf852dce57c1ac16e875d9ee04@helpdesk.example>','eve@eve.example','eve@eve.example','eve.example',X'46726F6D3A2048656C70203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A20657665406576652E6578616D706C650D0A5375626A6563743A205B542D534435532D38524D325D20576520726563656976656420796F7572206D6573736167650D0A446174653A205475652C2032322053657020323032362031343A31333A3230202D303030300D0A4D6573736167652D49443A203C30373166333962663835326463653537633161633136653837356439656530344068656C706465736B2E6578616D706C653E0D0A496E2D5265706C792D546F3A203C65766540637573746F6D65722E6578616D706C653E0D0A5265666572656E6365733A203C65766540637573746F6D65722E6578616D706C653E0D0A4175746F2D5375626D69747465643A206175746F2D7265706C6965640D0A582D4175746F2D526573706F6E73652D53757070726573733A20416C6C0D0A507265636564656E63653A2062756C6B0D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A5468616E6B20796F752E20542D534435532D38524D320D0A','queued',0,1790086400,1790086400,1790172800,'');
INSERT INTO "outbox" VALUES(7,12,1,'notice','<da3a5838de6d688da582366b3cb98ab3@helpdesk.example>','bob@team.example','bob@team.example','team.example',X'46726F6D3A2022657665406576652E6578616D706C65207669612048656C7022203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A20626F62407465616D2E6578616D706C650D0A5375626A6563743A205B542D534435532D38524D325D207375626A656374206576650D0A446174653A205475652C2032322053657020323032362031343A31333A3230202D303030300D0A4D6573736167652D49443A203C64613361353833386465366436383864613538323336366233636239386162334068656C706465736B2E6578616D706C653E0D0A4175746F2D5375626D69747465643A206175746F2D67656E6572617465640D0A582D4175746F2D526573706F6E73652D53757070726573733A20416C6C0D0A507265636564656E63653A2062756C6B0D0A582D496E626F756E642D4E6F746963653A20542D534435532D38524D320D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A5B696E626F756E645D20657665406576652E6578616D706C652077726F74653A0D0A0D0A74657874206576650D0A0D0A5B696E626F756E645D207768793A206E6F207369676E206F66206175746F6D61746963206D61696C3B206E6F206964206F662061206B6E6F776E206D6573736167652C0D0A5B696E626F756E645D20736F2061206E6577207469636B65743B20636F6E6669726D6174696F6E207175657565640D0A5B696E626F756E645D20596F7572207265706C7920746F2074686973206D61696C20676F657320746F20657665406576652E6578616D706C652C20776974686F75740D0A5B696E626F756E645D207468657365206C696E65732E20576974682060636C6F73656020616C6F6E65206F6E20697473206669727374206C696E652069740D0A5B696E626F756E645D20636C6F73657320746865207469636B65742E0D0A','queued',0,1790086400,1790086400,1790172800,'');
INSERT INTO "outbox" VALUES(8,12,1,'notice','<6664af4fe698ab66b6c8b43e6fb36219@helpdesk.example>','cleo@team.example','cleo@team.example','team.example',X'46726F6D3A2022657665406576652E6578616D706C65207669612048656C7022203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A20636C656F407465616D2E6578616D706C650D0A5375626A6563743A205B542D534435532D38524D325D207375626A656374206576650D0A446174653A205475652C2032322053657020323032362031343A31333A3230202D303030300D0A4D6573736167652D49443A203C36363634616634666536393861623636623663386234336536666233363231394068656C706465736B2E6578616D706C653E0D0A4175746F2D5375626D69747465643A206175746F2D67656E6572617465640D0A582D4175746F2D526573706F6E73652D53757070726573733A20416C6C0D0A507265636564656E63653A2062756C6B0D0A582D496E626F756E642D4E6F746963653A20542D534435532D38524D320D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A5B696E626F756E645D20657665406576652E6578616D706C652077726F74653A0D0A0D0A74657874206576650D0A0D0A5B696E626F756E645D207768793A206E6F207369676E206F66206175746F6D61746963206D61696C3B206E6F206964206F662061206B6E6F776E206D6573736167652C0D0A5B696E626F756E645D20736F2061206E6577207469636B65743B20636F6E6669726D6174696F6E207175657565640D0A5B696E626F756E645D20596F7572207265706C7920746F2074686973206D61696C20676F657320746F20657665406576652E6578616D706C652C20776974686F75740D0A5B696E626F756E645D207468657365206C696E65732E20576974682060636C6F73656020616C6F6E65206F6E20697473206669727374206C696E652069740D0A5B696E626F756E645D20636C6F73657320746865207469636B65742E0D0A','queued',0,1790086400,1790086400,1790172800,'');
INSERT INTO "outbox" VALUES(9,15,1,'confirmation','<385d3bbff4e9a4cc89ce31c9f42cb06d@helpdesk.example>','fay@fay.example','fay@fay.example','fay.example',X'46726F6D3A2048656C70203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A20666179406661792E6578616D706C650D0A5375626A6563743A205B542D5754355A2D4A3038535D20576520726563656976656420796F7572206D6573736167650D0A446174653A205475652C2032322053657020323032362031343A31333A3230202D303030300D0A4D6573736167652D49443A203C33383564336262666634653961346363383963653331633966343263623036644068656C706465736B2E6578616D706C653E0D0A496E2D5265706C792D546F3A203C66617940637573746F6D65722E6578616D706C653E0D0A5265666572656E6365733A203C66617940637573746F6D65722E6578616D706C653E0D0A4175746F2D5375626D69747465643A206175746F2D7265706C6965640D0A582D4175746F2D526573706F6E73652D53757070726573733A20416C6C0D0A507265636564656E63653A2062756C6B0D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A5468616E6B20796F752E20542D5754355A2D4A3038530D0A','queued',0,1790086400,1790086400,1790172800,'');
INSERT INTO "outbox" VALUES(10,14,1,'summary','<d941fada9e7185e4c41f51e3fb3bd7a8@helpdesk.example>','bob@team.example','bob@team.example','team.example',X'46726F6D3A2022666179406661792E6578616D706C65207669612048656C7022203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A20626F62407465616D2E6578616D706C650D0A5375626A6563743A205B542D5754355A2D4A3038535D207375626A656374206661790D0A446174653A205475652C2032322053657020323032362031343A31333A3230202D303030300D0A4D6573736167652D49443A203C64393431666164613965373138356534633431663531653366623362643761384068656C706465736B2E6578616D706C653E0D0A4175746F2D5375626D69747465643A206175746F2D67656E6572617465640D0A582D4175746F2D526573706F6E73652D53757070726573733A20416C6C0D0A507265636564656E63653A2062756C6B0D0A582D496E626F756E642D4E6F746963653A20542D5754355A2D4A3038530D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A4D6F7265207468616E2031206D65737361676573206861766520636F6D652077697468696E20616E20686F75723B20746865206E65787420617265206E6F7420746F6C64206279206D61696C2E0D0A5768617420776169747320666F7220616E20616E737765723A20696E626F756E64207469636B6574732077616974696E670D0A','queued',0,1790086400,1790086400,1790172800,'');
INSERT INTO "outbox" VALUES(11,14,1,'summary','<9f78e1d5d5230cdd75a5c65427fd93f9@helpdesk.example>','cleo@team.example','cleo@team.example','team.example',X'46726F6D3A2022666179406661792E6578616D706C65207669612048656C7022203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A20636C656F407465616D2E6578616D706C650D0A5375626A6563743A205B542D5754355A2D4A3038535D207375626A656374206661790D0A446174653A205475652C2032322053657020323032362031343A31333A3230202D303030300D0A4D6573736167652D49443A203C39663738653164356435323330636464373561356336353432376664393366394068656C706465736B2E6578616D706C653E0D0A4175746F2D5375626D69747465643A206175746F2D67656E6572617465640D0A582D4175746F2D526573706F6E73652D53757070726573733A20416C6C0D0A507265636564656E63653A2062756C6B0D0A582D496E626F756E642D4E6F746963653A20542D5754355A2D4A3038530D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A4D6F7265207468616E2031206D65737361676573206861766520636F6D652077697468696E20616E20686F75723B20746865206E65787420617265206E6F7420746F6C64206279206D61696C2E0D0A5768617420776169747320666F7220616E20616E737765723A20696E626F756E64207469636B6574732077616974696E670D0A','queued',0,1790086400,1790086400,1790172800,'');
INSERT INTO "outbox" VALUES(12,16,1,'answer','<62bf06adaa48595b59ecd93d80604a2a@helpdesk.example>','eve@eve.example','eve@eve.example','eve.example',X'46726F6D3A2048656C70203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A20657665406576652E6578616D706C650D0A5375626A6563743A205B542D534435532D38524D325D2052653A207375626A656374206576650D0A446174653A205475652C2032322053657020323032362031343A31333A3230202D303030300D0A4D6573736167652D49443A203C36326266303661646161343835393562353965636439336438303630346132614068656C706465736B2E6578616D706C653E0D0A496E2D5265706C792D546F3A203C65766540637573746F6D65722E6578616D706C653E0D0A5265666572656E6365733A203C65766540637573746F6D65722E6578616D706C653E0D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A446F6E652E0D0A','queued',0,1790086400,1790086400,1790172800,'');
INSERT INTO "outbox" VALUES(13,18,1,'confirmation','<ae7a8f756772ad30b53c698699b6f012@helpdesk.example>','gus@gus.example','gus@gus.example','gus.example',X'46726F6D3A2048656C70203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A20677573406775732E6578616D706C650D0A5375626A6563743A205B542D515048582D533052545D20576520726563656976656420796F7572206D6573736167650D0A446174653A205475652C2032322053657020323032362031343A31333A3230202D303030300D0A4D6573736167652D49443A203C61653761386637353637373261643330623533633639383639396236663031324068656C706465736B2E6578616D706C653E0D0A496E2D5265706C792D546F3A203C45564540637573746F6D65722E6578616D706C653E0D0A5265666572656E6365733A203C45564540637573746F6D65722E6578616D706C653E0D0A4175746F2D5375626D69747465643A206175746F2D7265706C6965640D0A582D4175746F2D526573706F6E73652D53757070726573733A20416C6C0D0A507265636564656E63653A2062756C6B0D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A5468616E6B20796F752E20542D515048582D533052540D0A','queued',0,1790086400,1790086400,1790172800,'');
INSERT INTO "outbox" VALUES(14,20,1,'confirmation','<9cd312ef92da47aa1dea8cebf253d685@helpdesk.example>','eve@eve.example','eve@eve.example','eve.example',X'46726F6D3A2048656C70203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A20657665406576652E6578616D706C650D0A5375626A6563743A205B542D354243532D4B3243385D20576520726563656976656420796F7572206D6573736167650D0A446174653A205475652C2032322053657020323032362031343A31333A3230202D303030300D0A4D6573736167652D49443A203C39636433313265663932646134376161316465613863656266323533643638354068656C706465736B2E6578616D706C653E0D0A496E2D5265706C792D546F3A203C45766540437573746F6D65722E6578616D706C653E0D0A5265666572656E6365733A203C45766540437573746F6D65722E6578616D706C653E0D0A4175746F2D5375626D69747465643A206175746F2D7265706C6965640D0A582D4175746F2D526573706F6E73652D53757070726573733A20416C6C0D0A507265636564656E63653A2062756C6B0D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A5468616E6B20796F752E20542D354243532D4B3243380D0A','queued',0,1790086400,1790086400,1790172800,'');
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
INSERT INTO "provider" VALUES('Ours','{"from": "absender", "subject": "betreff", "text": "inhalt.0", "message_id": "mid"}');
CREATE TABLE queue (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE           -- as people say it; 'Automatic' takes unmatched automatic mail
        CONSTRAINT "a queue needs a name" CHECK (trim(name) <> ''),
    is_default INTEGER NOT NULL DEFAULT 0 CHECK (is_default IN (0, 1))
) STRICT;
INSERT INTO "queue" VALUES(1,'Front desk',1);
INSERT INTO "queue" VALUES(2,'Automatic',0);
INSERT INTO "queue" VALUES(3,'Sales',0);
CREATE TABLE refused_caller (
    -- Who posted with no or a wrong secret; the latest 1,000 clients. `inbound doctor` shows the last hour's.
    client TEXT PRIMARY KEY,                        -- address that the server or its trusted proxy saw
    posts INTEGER NOT NULL,                         -- how many
    last_at INTEGER NOT NULL
) STRICT;
INSERT INTO "refused_caller" VALUES('',1,1790000240);
INSERT INTO "refused_caller" VALUES('localhost',1,1790086400);
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
INSERT INTO "rejected" VALUES(1,1790000240,1,422,'from: required; message_id: required','application/json',X'7B2274657874223A20226E6F2073656E646572227D','1325af2d359d3f29c446fa528262aeffa0faf15d1993f989d01b73656c433bce',1);
INSERT INTO "rejected" VALUES(2,1790000240,1,400,'the body is not JSON in UTF-8: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)','application/json',X'7B','021fb596db81e6d02bf3d2586ee3981fe519f275c0ac9ca76bbcf2ebb4097d96',1);
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
INSERT INTO "ticket" VALUES(1,'T-X8HS-QT09',1,1,'Printer on fire','ada@customer.example','Ada Lovelace','closed','team',1790000000,1790000120);
INSERT INTO "ticket" VALUES(2,'T-K4SY-JSQT',2,1,'failure notice','MAILER-DAEMON@qmail.customer.example','','open','customer',1790000180,1790000180);
INSERT INTO "ticket" VALUES(3,'T-Z9KV-SFBB',1,1,'日本語 ünd','grace@customer.example','Grace Hopper','open','customer',1790000180,1790000180);
INSERT INTO "ticket" VALUES(4,'T-ZA7M-RRZE',1,1,'Again','bob@elsewhere.example','','open','customer',1790000180,1790000240);
INSERT INTO "ticket" VALUES(5,'T-SD5S-8RM2',1,1,'subject eve','eve@eve.example','','open','team',1790086400,1790086400);
INSERT INTO "ticket" VALUES(6,'T-WT5Z-J08S',1,1,'subject fay','fay@fay.example','','open','customer',1790086400,1790086400);
INSERT INTO "ticket" VALUES(7,'T-QPHX-S0RT',1,1,'subject gus','gus@gus.example','','open','customer',1790086400,1790086400);
INSERT INTO "ticket" VALUES(8,'T-5BCS-K2C8',1,1,'subject eve','eve@eve.example','','open','customer',1790086400,1790086400);
CREATE TRIGGER queue_automatic_name BEFORE UPDATE OF name ON queue WHEN OLD.name = 'Automatic' BEGIN
    SELECT RAISE(ABORT, 'unmatched automatic mail goes to this queue');
END;
CREATE TRIGGER queue_automatic BEFORE DELETE ON queue WHEN OLD.name = 'Automatic' BEGIN
    SELECT RAISE(ABORT, 'unmatched automatic mail goes to this queue');
END;
CREATE UNIQUE INDEX queue_default ON queue (is_default) WHERE is_default;
CREATE UNIQUE INDEX email_account_default ON email_account (is_default) WHERE is_default;
CREATE TRIGGER email_account_default BEFORE UPDATE OF is_default ON email_account WHEN NEW.is_default BEGIN
    UPDATE email_account SET is_default = 0 WHERE id <> NEW.id;  -- a new default replaces the old one
END;
CREATE INDEX ticket_open ON ticket (updated_at) WHERE status = 'open';
CREATE INDEX ticket_updated ON ticket (updated_at);
CREATE INDEX ticket_requester ON ticket (requester);
CREATE TRIGGER ticket_delete AFTER DELETE ON ticket BEGIN  -- also in a shell that has foreign keys off
    DELETE FROM message WHERE ticket = OLD.id;
END;
CREATE TRIGGER message_delete AFTER DELETE ON message BEGIN
    DELETE FROM attachment WHERE message = OLD.id;
    DELETE FROM outbox WHERE message = OLD.id;
END;
CREATE INDEX message_ticket ON message (ticket);
CREATE INDEX message_thread ON message (email_account, message_id COLLATE NOCASE);
CREATE INDEX attachment_message ON attachment (message);
CREATE INDEX outbox_message ON outbox (message);
CREATE INDEX outbox_own_id ON outbox (email_account, own_message_id COLLATE NOCASE)  -- thread, by what is
    WHERE purpose NOT IN ('confirmation', 'reply');
CREATE INDEX outbox_state ON outbox (state, email_account, next_attempt_at);
CREATE INDEX outbox_created ON outbox (created_at) WHERE next_attempt_at IS NOT NULL;
CREATE INDEX outbox_mailbox ON outbox (mailbox, purpose, created_at);
CREATE INDEX outbox_domain ON outbox (domain, purpose, created_at);
CREATE INDEX outbox_account ON outbox (email_account, purpose, created_at);
CREATE VIEW inbox AS                                -- open tickets, newest first, readable times (UTC)
    SELECT ticket.reference, queue.name AS queue, ticket.subject, ticket.requester,
           (SELECT count(*) FROM message WHERE message.ticket = ticket.id) AS messages,
           datetime(ticket.created_at, 'unixepoch') AS created,
           datetime(ticket.updated_at, 'unixepoch') AS updated
    FROM ticket JOIN queue ON queue.id = ticket.queue
    WHERE ticket.status = 'open'
    ORDER BY ticket.created_at DESC, ticket.id DESC;
COMMIT;
