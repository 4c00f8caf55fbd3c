PRAGMA application_id = 1768841828;
PRAGMA user_version = 2;
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

    CHECK (previous_secret IS NULL OR previous_secret_until IS NOT NULL),
    CONSTRAINT "no password goes over plain text: smtp_security=starttls or tls, or no smtp_username"
        CHECK (smtp_security <> 'none' OR smtp_username IS NULL)
) STRICT;
INSERT INTO "email_account" VALUES(1,'support@helpdesk.example','Help',1,1,'a-secret-of-the-tests-0123456789','the-secret-before-0123456789',1790086400,NULL,NULL,NULL,NULL,'starttls',NULL,NULL,NULL,'Thank you. {reference}
',3,10,30,150,'info@helpdesk.example');
INSERT INTO "email_account" VALUES(2,'sales@helpdesk.example','Support',3,0,'the-secret-of-sales-0123456789',NULL,NULL,NULL,NULL,NULL,NULL,'starttls',NULL,NULL,NULL,'Hello,

we have received your message and opened a ticket for it.

Your reference: {reference}

To add something, just reply to this mail.
',3,10,30,200,NULL);
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
INSERT INTO "outbox" VALUES(1,2,1,'confirmation','ada@customer.example','ada@customer.example','customer.example',X'46726F6D3A2048656C70203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A2061646140637573746F6D65722E6578616D706C650D0A5375626A6563743A205B542D583848532D515430395D20576520726563656976656420796F7572206D6573736167650D0A446174653A204D6F6E2C2032312053657020323032362031343A31333A3230202D303030300D0A4D6573736167652D49443A203C61323665386630386164393361393463383461633266623830653135356162304068656C706465736B2E6578616D706C653E0D0A496E2D5265706C792D546F3A203C666972737440637573746F6D65722E6578616D706C653E0D0A5265666572656E6365733A203C666972737440637573746F6D65722E6578616D706C653E0D0A4175746F2D5375626D69747465643A206175746F2D7265706C6965640D0A582D4175746F2D526573706F6E73652D53757070726573733A20416C6C0D0A507265636564656E63653A2062756C6B0D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A5468616E6B20796F752E20542D583848532D515430390D0A','sent',1,1790000000,NULL,1790086400,'');
INSERT INTO "outbox" VALUES(2,3,1,'reply','ada@customer.example','ada@customer.example','customer.example',X'46726F6D3A2048656C70203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A2061646140637573746F6D65722E6578616D706C650D0A5375626A6563743A205B542D583848532D515430395D2052653A205072696E746572206F6E20666972650D0A446174653A204D6F6E2C2032312053657020323032362031343A31343A3230202D303030300D0A4D6573736167652D49443A203C37653663633261613338353035633236613963323730346663306463626239344068656C706465736B2E6578616D706C653E0D0A496E2D5265706C792D546F3A203C666972737440637573746F6D65722E6578616D706C653E0D0A5265666572656E6365733A203C666972737440637573746F6D65722E6578616D706C653E0D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A50756C6C2074686520706C75672E0D0A','sent',1,1790000060,NULL,1790086460,'');
INSERT INTO "outbox" VALUES(3,7,1,'confirmation','grace@customer.example','grace@customer.example','customer.example',X'46726F6D3A2048656C70203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A20677261636540637573746F6D65722E6578616D706C650D0A5375626A6563743A205B542D5A394B562D534642425D20576520726563656976656420796F7572206D6573736167650D0A446174653A204D6F6E2C2032312053657020323032362031343A31363A3230202D303030300D0A4D6573736167652D49443A203C61626532636232633363346561663533346636343564373638303263363233354068656C706465736B2E6578616D706C653E0D0A496E2D5265706C792D546F3A203C666F7572746840637573746F6D65722E6578616D706C653E0D0A5265666572656E6365733A203C666F7572746840637573746F6D65722E6578616D706C653E0D0A4175746F2D5375626D69747465643A206175746F2D7265706C6965640D0A582D4175746F2D526573706F6E73652D53757070726573733A20416C6C0D0A507265636564656E63653A2062756C6B0D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A5468616E6B20796F752E20542D5A394B562D534642420D0A','failed',0,1790000180,NULL,1790086580,'550 no');
INSERT INTO "outbox" VALUES(4,9,1,'confirmation','bob@elsewhere.example','bob@elsewhere.example','elsewhere.example',X'46726F6D3A2048656C70203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A20626F6240656C736577686572652E6578616D706C650D0A5375626A6563743A205B542D5A41374D2D52525A455D20576520726563656976656420796F7572206D6573736167650D0A446174653A204D6F6E2C2032312053657020323032362031343A31363A3230202D303030300D0A4D6573736167652D49443A203C30663736303332326265633135663863333330303630613761653961343836634068656C706465736B2E6578616D706C653E0D0A496E2D5265706C792D546F3A203C666966746840656C736577686572652E6578616D706C653E0D0A5265666572656E6365733A203C666966746840656C736577686572652E6578616D706C653E0D0A4175746F2D5375626D69747465643A206175746F2D7265706C6965640D0A582D4175746F2D526573706F6E73652D53757070726573733A20416C6C0D0A507265636564656E63653A2062756C6B0D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A5468616E6B20796F752E20542D5A41374D2D52525A450D0A','queued',0,1790000180,1790000180,1790086580,'');
INSERT INTO "outbox" VALUES(5,10,1,'reply','bob@elsewhere.example','bob@elsewhere.example','elsewhere.example',X'46726F6D3A2048656C70203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A20626F6240656C736577686572652E6578616D706C650D0A5375626A6563743A205B542D5A41374D2D52525A455D2052653A20416761696E0D0A446174653A204D6F6E2C2032312053657020323032362031343A31363A3230202D303030300D0A4D6573736167652D49443A203C65323762616431336433373235303065646332306264353132613832646166344068656C706465736B2E6578616D706C653E0D0A496E2D5265706C792D546F3A203C666966746840656C736577686572652E6578616D706C653E0D0A5265666572656E6365733A203C666966746840656C736577686572652E6578616D706C653E0D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A5768696368206F6E653F0D0A','queued',0,1790000180,1790000180,1790086580,'');
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
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL                     -- of the last message or change of status
) STRICT;
INSERT INTO "ticket" VALUES(1,'T-X8HS-QT09',1,1,'Printer on fire','ada@customer.example','Ada Lovelace','closed',1790000000,1790000120);
INSERT INTO "ticket" VALUES(2,'T-K4SY-JSQT',2,1,'failure notice','MAILER-DAEMON@qmail.customer.example','','open',1790000180,1790000180);
INSERT INTO "ticket" VALUES(3,'T-Z9KV-SFBB',1,1,'日本語 ünd','grace@customer.example','Grace Hopper','open',1790000180,1790000180);
INSERT INTO "ticket" VALUES(4,'T-ZA7M-RRZE',1,1,'Again','bob@elsewhere.example','','open',1790000180,1790000240);
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
CREATE INDEX outbox_state ON outbox (state, next_attempt_at);
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
