PRAGMA application_id = 1768841828;
PRAGMA user_version = 1;
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
INSERT INTO "attachment" VALUES(2,1,'broken.bin','application/octet-stream','',0,NULL,NULL,'not kept, its content is broken: Only base64 data is allowed');
CREATE TABLE command (
    -- What `inbound` does where a single statement does it. usage: a word in capitals is the parameter of
    -- that name in lower case, [one in brackets] may be left out. Further parameters: :account (row of
    -- --account), :now, :until (now + --keep), :token (a new random secret).
    usage TEXT PRIMARY KEY,
    statement TEXT NOT NULL                         -- what it returns is printed
) STRICT;
INSERT INTO "command" VALUES('secret [show]','SELECT * FROM secret WHERE id = :account');
INSERT INTO "command" VALUES('secret set VALUE','UPDATE email_account SET inbound_secret = :value, previous_secret = NULL
      WHERE id = :account RETURNING address, inbound_secret');
INSERT INTO "command" VALUES('secret rotate','UPDATE email_account SET previous_secret = inbound_secret, previous_secret_until = :until,
      inbound_secret = :token WHERE id = :account
      RETURNING address, inbound_secret, previous_secret, previous_secret_until');
INSERT INTO "command" VALUES('account [show]','SELECT * FROM account WHERE id = :account');
INSERT INTO "command" VALUES('account add ADDRESS','INSERT INTO email_account (address, queue, inbound_secret)
      SELECT :address, id, :token FROM queue WHERE is_default RETURNING address, inbound_secret');
INSERT INTO "command" VALUES('tickets','SELECT * FROM tickets');
INSERT INTO "command" VALUES('close REF','UPDATE ticket SET status = ''closed'', updated_at = :now WHERE reference = upper(:ref)
      RETURNING reference, status');
INSERT INTO "command" VALUES('outbox [list]','SELECT * FROM mail_out');
INSERT INTO "command" VALUES('outbox show ID','SELECT * FROM mail_out_whole WHERE id = :id');
INSERT INTO "command" VALUES('outbox retry ID','UPDATE outbox SET state = ''queued'', next_attempt_at = :now, give_up_at = :now + 86400
      WHERE id = :id AND (state IN (''queued'', ''failed'') OR state = ''sending'' AND next_attempt_at <= :now)
      RETURNING id, state');
INSERT INTO "command" VALUES('rejected [list]','SELECT * FROM mail_refused');
INSERT INTO "command" VALUES('rejected show ID','SELECT * FROM mail_refused_whole WHERE id = :id');
INSERT INTO "command" VALUES('rejected delete ID','DELETE FROM rejected WHERE id = :id RETURNING id, reason');
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
INSERT INTO "email_account" VALUES(1,'support@helpdesk.example','Help',3,1,'a-secret-of-the-tests-0123456789','the-secret-before-0123456789',1790086400,NULL,'relay.example',2525,'starttls','help','correct horse',NULL,'Dear sender,

your reference is {reference}.
',3,10,150,'team@helpdesk.example');
INSERT INTO "email_account" VALUES(2,'sales@helpdesk.example','Support',4,0,'the-secret-of-sales-0123456789',NULL,NULL,NULL,NULL,NULL,'starttls',NULL,NULL,NULL,'Hello,

we have received your message and opened a ticket for it.

Your reference: {reference}

To add something, just reply to this mail.
',3,10,200,NULL);
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
INSERT INTO "message" VALUES(2,1,1,'out','<5feab79521b99e3f94b6a79c7f030cc6@helpdesk.example>','','<first@customer.example>','["<first@customer.example>"]','support@helpdesk.example','Help','','["ada@customer.example"]','[]','[T-0EGN-GW50] We received your message','Dear sender,

your reference is T-0EGN-GW50.
',NULL,'[["From", "Help <support@helpdesk.example>"], ["To", "ada@customer.example"], ["Subject", "[T-0EGN-GW50] We received your message"], ["Date", "Mon, 21 Sep 2026 14:13:20 -0000"], ["Message-ID", "<5feab79521b99e3f94b6a79c7f030cc6@helpdesk.example>"], ["In-Reply-To", "<first@customer.example>"], ["References", "<first@customer.example>"], ["Auto-Submitted", "auto-replied"], ["X-Auto-Response-Suppress", "All"], ["Precedence", "bulk"]]',NULL,'our confirmation',NULL,'[]',1790000000);
INSERT INTO "message" VALUES(3,1,1,'in','<second@customer.example>','520318051909ce53541d3bc512bb30d81e6b880aa1cf1374d1b00300760206cb','<first@customer.example>','[]','ada@customer.example','Ada Lovelace',NULL,'[]','["grace@customer.example"]','Re: Printer on fire','Still.',NULL,'[]','human','no sign of automatic mail; In-Reply-To names a message of this ticket; no confirmation: it opened no ticket','not due','[]',1790000060);
INSERT INTO "message" VALUES(4,1,1,'out','<46f9dd0cea870700494b24bb5899b981@helpdesk.example>','','<second@customer.example>','["<second@customer.example>"]','support@helpdesk.example','Help','support@helpdesk.example','["ada@customer.example"]','[]','[T-0EGN-GW50] Re: Printer on fire','We are on our way.
',NULL,'[["From", "Help <support@helpdesk.example>"], ["To", "ada@customer.example"], ["Subject", "[T-0EGN-GW50] Re: Printer on fire"], ["Date", "Mon, 21 Sep 2026 14:15:20 -0000"], ["Message-ID", "<46f9dd0cea870700494b24bb5899b981@helpdesk.example>"], ["In-Reply-To", "<second@customer.example>"], ["References", "<second@customer.example>"]]',NULL,'our reply',NULL,'[]',1790000120);
INSERT INTO "message" VALUES(5,2,1,'in','<third@mx.customer.example>','8501efe38a1ca985f5862f2c43199cc2300b02c10d004923a7af1e29bc244139',NULL,'[]','MAILER-DAEMON@mx.customer.example','','','[]','[]','Undeliverable','gone',NULL,'[["Auto-Submitted", "auto-replied"]]','auto-reply','Auto-Submitted (RFC 3834 5.2); no id of a known message, so a new ticket; confirmation withheld: never for auto-reply mail (RFC 3834 2)','withheld','[]',1790000180);
INSERT INTO "message" VALUES(6,3,1,'in','<fourth@customer.example>','541901868306bf02c5ba756d644182b5ed8d3868155a4958085e7be362e8a0a5',NULL,'[]','grace@customer.example','Grace Hopper',NULL,'[]','[]','日本語 ünd','Grüße','<p>Grüße</p>','[["X-Mailer", "Pen"], ["Received", "by a"], ["Received", "by b"]]','human','no sign of automatic mail; no id of a known message, so a new ticket; confirmation queued','queued','[]',1790000180);
INSERT INTO "message" VALUES(7,3,1,'out','<09e393c0c21ebf29f7d5ba75308006b0@helpdesk.example>','','<fourth@customer.example>','["<fourth@customer.example>"]','support@helpdesk.example','Help','','["grace@customer.example"]','[]','[T-Y1NH-46K8] We received your message','Dear sender,

your reference is T-Y1NH-46K8.
',NULL,'[["From", "Help <support@helpdesk.example>"], ["To", "grace@customer.example"], ["Subject", "[T-Y1NH-46K8] We received your message"], ["Date", "Mon, 21 Sep 2026 14:16:20 -0000"], ["Message-ID", "<09e393c0c21ebf29f7d5ba75308006b0@helpdesk.example>"], ["In-Reply-To", "<fourth@customer.example>"], ["References", "<fourth@customer.example>"], ["Auto-Submitted", "auto-replied"], ["X-Auto-Response-Suppress", "All"], ["Precedence", "bulk"]]',NULL,'our confirmation',NULL,'[]',1790000180);
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
INSERT INTO "outbox" VALUES(1,2,1,'confirmation','ada@customer.example','ada@customer.example',X'46726F6D3A2048656C70203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A2061646140637573746F6D65722E6578616D706C650D0A5375626A6563743A205B542D3045474E2D475735305D20576520726563656976656420796F7572206D6573736167650D0A446174653A204D6F6E2C2032312053657020323032362031343A31333A3230202D303030300D0A4D6573736167652D49443A203C35666561623739353231623939653366393462366137396337663033306363364068656C706465736B2E6578616D706C653E0D0A496E2D5265706C792D546F3A203C666972737440637573746F6D65722E6578616D706C653E0D0A5265666572656E6365733A203C666972737440637573746F6D65722E6578616D706C653E0D0A4175746F2D5375626D69747465643A206175746F2D7265706C6965640D0A582D4175746F2D526573706F6E73652D53757070726573733A20416C6C0D0A507265636564656E63653A2062756C6B0D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A446561722073656E6465722C0D0A0D0A796F7572207265666572656E636520697320542D3045474E2D475735302E0D0A','sent',1,1790000000,NULL,1790086400,'');
INSERT INTO "outbox" VALUES(2,4,1,'reply','ada@customer.example','ada@customer.example',X'46726F6D3A2048656C70203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A2061646140637573746F6D65722E6578616D706C650D0A5375626A6563743A205B542D3045474E2D475735305D2052653A205072696E746572206F6E20666972650D0A446174653A204D6F6E2C2032312053657020323032362031343A31353A3230202D303030300D0A4D6573736167652D49443A203C34366639646430636561383730373030343934623234626235383939623938314068656C706465736B2E6578616D706C653E0D0A496E2D5265706C792D546F3A203C7365636F6E6440637573746F6D65722E6578616D706C653E0D0A5265666572656E6365733A203C7365636F6E6440637573746F6D65722E6578616D706C653E0D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A576520617265206F6E206F7572207761792E0D0A','failed',2,1790000120,NULL,1790086520,'550 no such user');
INSERT INTO "outbox" VALUES(3,7,1,'confirmation','grace@customer.example','grace@customer.example',X'46726F6D3A2048656C70203C737570706F72744068656C706465736B2E6578616D706C653E0D0A546F3A20677261636540637573746F6D65722E6578616D706C650D0A5375626A6563743A205B542D59314E482D34364B385D20576520726563656976656420796F7572206D6573736167650D0A446174653A204D6F6E2C2032312053657020323032362031343A31363A3230202D303030300D0A4D6573736167652D49443A203C30396533393363306332316562663239663764356261373533303830303662304068656C706465736B2E6578616D706C653E0D0A496E2D5265706C792D546F3A203C666F7572746840637573746F6D65722E6578616D706C653E0D0A5265666572656E6365733A203C666F7572746840637573746F6D65722E6578616D706C653E0D0A4175746F2D5375626D69747465643A206175746F2D7265706C6965640D0A582D4175746F2D526573706F6E73652D53757070726573733A20416C6C0D0A507265636564656E63653A2062756C6B0D0A436F6E74656E742D547970653A20746578742F706C61696E3B20636861727365743D227574662D38220D0A436F6E74656E742D5472616E736665722D456E636F64696E673A2071756F7465642D7072696E7461626C650D0A4D494D452D56657273696F6E3A20312E300D0A0D0A446561722073656E6465722C0D0A0D0A796F7572207265666572656E636520697320542D59314E482D34364B382E0D0A','queued',0,1790000180,1790000180,1790086580,'');
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
INSERT INTO "provider" VALUES(1,'Amazon SES','TopicArn Type=SubscriptionConfirmation !message_id',NULL,NULL,'','','an SNS subscription: open the SubscribeURL that `inbound rejected show` prints, to confirm it',202);
INSERT INTO "provider" VALUES(2,'Amazon SES','TopicArn Type !message_id',NULL,NULL,'','','an SNS notice, no mail',200);
INSERT INTO "provider" VALUES(3,'Amazon SES','notificationType !notificationType=Received !message_id',NULL,NULL,'','','an SES notice, no mail',200);
INSERT INTO "provider" VALUES(4,'SocketLabs','SecretKey Type !message_id',NULL,NULL,'','','a SocketLabs validation or event, no mail',200);
INSERT INTO "provider" VALUES(5,'Mailgun','event-data !message_id',NULL,NULL,'','','a Mailgun event, no mail',200);
INSERT INTO "provider" VALUES(6,'Postmark','RecordType MessageID !message_id',NULL,NULL,'','','a Postmark event, no mail',200);
INSERT INTO "provider" VALUES(7,'Resend','type=email.received data.email_id',NULL,NULL,'','','Resend posts neither text nor headers: have the mail itself forwarded, to `inbound relay` or another provider',422);
INSERT INTO "provider" VALUES(8,'Amazon SES','notificationType=Received !content',NULL,NULL,'','','this SES notice has no `content`: use an SNS action, not S3, in the receipt rule',422);
INSERT INTO "provider" VALUES(9,'Mandrill','mandrill_events','from=from_email from_name to cc subject text html headers raw=raw_msg attachments=attachments+images spam=spam_report.score','mandrill_events','event=inbound|!event !type','msg',NULL,NULL);
INSERT INTO "provider" VALUES(10,'Mailgun','timestamp token signature body-mime|message-headers','envelope=sender from To subject text=body-plain html=body-html headers=message-headers message_id=Message-Id raw=body-mime attachments=files|attachments',NULL,'','',NULL,NULL);
INSERT INTO "provider" VALUES(11,'SendGrid','envelope~ headers~|email !message_id','envelope=envelope.from from to cc subject text html headers raw=email attachments=files spam=spam_score',NULL,'','',NULL,NULL);
INSERT INTO "provider" VALUES(12,'CloudMailin','envelope{} headers{}|message !from !text !message_id','envelope=envelope.from headers text=plain html raw=message attachments=files|attachments spam=envelope.spamd.score',NULL,'','',NULL,NULL);
INSERT INTO "provider" VALUES(13,'Postal','rcpt_to mail_from plain_body|html_body|message','envelope=mail_from from to cc subject text=plain_body+replies_from_plain_body html=html_body message_id in_reply_to references attachments raw=message Auto-Submitted=auto_submitted X-Postal-Bounce=bounce Date=date spam=spam_status',NULL,'','',NULL,NULL);
INSERT INTO "provider" VALUES(14,'SparkPost','events.0.msys{}|events.1.msys{}','envelope=msg_from raw=content.email_rfc822 subject=content.subject text=content.text html=content.html headers=content.headers to=content.to cc=content.cc','events','msys.relay_message|!msys','msys.relay_message',NULL,NULL);
INSERT INTO "provider" VALUES(15,'Amazon SES','notificationType=Received content','envelope=mail.source raw=content spam=receipt.spamVerdict.status+receipt.dmarcVerdict.status',NULL,'','',NULL,NULL);
INSERT INTO "provider" VALUES(16,'SocketLabs','Message{} InboundMailFrom','envelope=InboundMailFrom from=Message.From to=Message.To cc=Message.Cc|Message.CC subject=Message.Subject text=Message.TextBody html=Message.HtmlBody headers=Message.CustomHeaders message_id=Message.MessageId spam=SpamScore attachments=Message.Attachments+Message.EmbeddedMedia',NULL,'','',NULL,NULL);
INSERT INTO "provider" VALUES(17,'Postmark','FromFull{} Headers[]','envelope=Headers from=FromFull to=ToFull cc=CcFull subject=Subject text=TextBody html=HtmlBody headers=Headers attachments=Attachments raw=RawEmail',NULL,'','',NULL,NULL);
INSERT INTO "provider" VALUES(18,'Brevo','items.0.Uuid|items.1.Uuid','from=From to=To cc=Cc subject=Subject text=RawTextBody html=RawHtmlBody headers=Headers message_id=MessageId in_reply_to=InReplyTo attachments=Attachments spam=SpamScore','items','','',NULL,NULL);
INSERT INTO "provider" VALUES(19,'Mailjet','Headers{} Sender Recipient','envelope=Sender from=From subject=Subject text=Text-part html=Html-part headers=Headers attachments=Parts spam=SpamAssassinScore',NULL,'','',NULL,NULL);
INSERT INTO "provider" VALUES(20,'MailerSend','type=inbound.message','envelope=data.sender.email raw=data.raw from=data.from subject=data.subject text=data.text html=data.html headers=data.headers attachments=data.attachments to=data.recipients.to.data',NULL,'','',NULL,NULL);
INSERT INTO "provider" VALUES(21,'Forward Email','headerLines[] session{}','envelope=session.sender from=from.value to=to.value cc=cc.value subject text html message_id=messageId in_reply_to=inReplyTo references attachments headers=headerLines',NULL,'','',NULL,NULL);
INSERT INTO "provider" VALUES(22,'Ours','absender mid','from=absender subject=betreff text=inhalt.0 message_id=mid',NULL,'','',NULL,NULL);
CREATE TABLE queue (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,          -- as people say it; 'Automatic' takes unmatched automatic mail
    is_default INTEGER NOT NULL DEFAULT 0 CHECK (is_default IN (0, 1))
) STRICT;
INSERT INTO "queue" VALUES(1,'Support',1);
INSERT INTO "queue" VALUES(2,'Automatic',0);
INSERT INTO "queue" VALUES(3,'Front desk',0);
INSERT INTO "queue" VALUES(4,'Sales',0);
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
INSERT INTO "rejected" VALUES(1,1790000180,1,422,'from: required; message_id: required','application/json',X'7B2274657874223A20226E6F2073656E646572227D','1325af2d359d3f29c446fa528262aeffa0faf15d1993f989d01b73656c433bce',2);
INSERT INTO "rejected" VALUES(2,1790000180,1,400,'the body is not JSON in UTF-8: Expecting value: line 1 column 1 (char 0)','application/json',X'6E6F204A534F4E','29ecbeb830e3244605e5a88493e4088424a71780e5cf59bb3475f278f294335b',1);
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
INSERT INTO "sign" VALUES(1,'bounce','raw-content-type','multipart/report.*delivery-status.*',NULL,NULL,'a delivery status report (RFC 3464 2)');
INSERT INTO "sign" VALUES(2,'bounce','raw-content-type','multipart/report.*feedback-report.*',NULL,NULL,'an abuse report (RFC 5965)');
INSERT INTO "sign" VALUES(3,'bounce','raw-content-type','multipart/report.*disposition-notification.*','raw-auto-submitted','.*rejected.*','a refusal in the form of a receipt (RFC 5429)');
INSERT INTO "sign" VALUES(4,'auto-reply','raw-content-type','multipart/report.*disposition-notification.*',NULL,NULL,'a receipt (RFC 8098 2)');
INSERT INTO "sign" VALUES(5,'bounce','x-failed-recipients','.+',NULL,NULL,'X-Failed-Recipients (Exim, Gmail)');
INSERT INTO "sign" VALUES(6,'auto-reply','auto-submitted','(?!(?:no|auto-generated|auto-notified)$).+',NULL,NULL,'Auto-Submitted (RFC 3834 5.2)');
INSERT INTO "sign" VALUES(7,'auto-reply','x-autoreply x-auto-reply x-autorespond x-autoresponder x-autoresponse x-autoreply-from x-mail-autoreply x-vacation','(?!(?:no|false|0)$).+',NULL,NULL,'an autoresponder''s own header');
INSERT INTO "sign" VALUES(8,'auto-reply','precedence x-precedence preference','auto_reply',NULL,NULL,'Precedence: auto_reply');
INSERT INTO "sign" VALUES(9,'auto-reply','x-autogenerated','reply',NULL,NULL,'X-Autogenerated: reply (Communigate)');
INSERT INTO "sign" VALUES(10,'auto-reply','x-fc-machinegenerated','true',NULL,NULL,'X-FC-MachineGenerated (FirstClass)');
INSERT INTO "sign" VALUES(11,'auto-reply','x-post-messageclass raw-x-post-messageclass','.*autoresponder.*|9',NULL,NULL,'X-POST-MessageClass (Mailtraq)');
INSERT INTO "sign" VALUES(12,'auto-reply','delivered-to','autoresponder',NULL,NULL,'Delivered-To: Autoresponder (qmail)');
INSERT INTO "sign" VALUES(13,'auto-reply','x-apple-action','vacation.*',NULL,NULL,'X-Apple-Action: VACATION (iCloud)');
INSERT INTO "sign" VALUES(14,'auto-reply','x-ms-exchange-generated-message-source','mailbox rules agent',NULL,NULL,'Exchange''s Mailbox Rules Agent');
INSERT INTO "sign" VALUES(15,'auto-reply','x-ms-exchange-inbox-rules-loop','.+','raw-x-auto-response-suppress','(?:.*[,;\s])?(?:all|autoreply)(?:[,;\s].*)?','an Exchange rule that wants no answer');
INSERT INTO "sign" VALUES(16,'auto-reply','x-ms-exchange-inbox-rules-loop','.+','auto-submitted','(?!no$).+','an Exchange rule''s own mail');
INSERT INTO "sign" VALUES(17,'auto-reply','subject','(?:\[[^\]]*\]\s*|(?:re|aw|sv|antwort):\s*)*(?:(?:automatic reply|auto(?:matic)?[- ]?(?:reply|response)|out of (?:the )?office(?: autoreply| reply)?|abwesenheitsnotiz|automatische antwort|réponse automatique|absence du bureau|respuesta automática|resposta automática|automatiskt? svar|automatisch antwoord|frånvaro|fuori sede|risposta automatica|automatická odpověď|automaattinen vastaus|автоматический ответ|automatikus válasz|automatyczna odpowiedź|自動応答|自动回复|自動回覆)\s*(?:[:：].*|$)|auto\s*[:：].*)|.* is out of the office(?:\.| until .*| ?\(returning.*)?',NULL,NULL,'the subject of a vacation notice');
INSERT INTO "sign" VALUES(18,'bounce','from','mailer-daemon|mail-daemon|mdaemon',NULL,NULL,'From is a mailer daemon');
INSERT INTO "sign" VALUES(19,'bounce','envelope','mailer-daemon|mail-daemon|mdaemon',NULL,NULL,'the envelope sender is a mailer daemon (RFC 3834 7)');
INSERT INTO "sign" VALUES(20,'bounce','x-postal-bounce','true|1',NULL,NULL,'Postal takes it for a bounce');
INSERT INTO "sign" VALUES(21,'bounce','part','message/delivery-status','weak','.+','it carries a delivery status');
INSERT INTO "sign" VALUES(22,'bounce','from','post[-_.]?master','weak','.+','postmaster, and a sign of a bounce');
INSERT INTO "sign" VALUES(23,'bounce','envelope','<>',NULL,NULL,'a null envelope sender (RFC 5321 4.5.5)');
INSERT INTO "sign" VALUES(24,'machine','auto-submitted','auto-generated|auto-notified',NULL,NULL,'Auto-Submitted: nobody typed it (RFC 3834 5.1)');
INSERT INTO "sign" VALUES(25,'machine','x-ms-exchange-generated-message-source','.+',NULL,NULL,'made by an Exchange agent');
INSERT INTO "sign" VALUES(26,'list','precedence x-precedence','list',NULL,NULL,'Precedence: list (RFC 3834 2)');
INSERT INTO "sign" VALUES(27,'list','list-id list-post list-owner list-archive list-help list-subscribe mailing-list x-beenthere x-mailman-version','.*',NULL,NULL,'a mailing list''s header (RFC 2919, RFC 5230 4.6)');
INSERT INTO "sign" VALUES(28,'bulk','precedence x-precedence','(?:bulk|junk)\b.*',NULL,NULL,'Precedence: bulk or junk (RFC 3834 2)');
INSERT INTO "sign" VALUES(29,'bulk','list-unsubscribe list-unsubscribe-post feedback-id x-campaignid x-csa-complaints','.*',NULL,NULL,'a mass mailing''s header');
INSERT INTO "sign" VALUES(30,'weak','subject','(?!\s*(?:fwd?|wg|tr|rv|enc|i):).*(?:undeliver|returned mail|failure notice|delivery (?:status notification|failure|has failed|incomplete)|mail delivery (?:failed|failure|system)|unzustellbar|non remis).*',NULL,NULL,'the subject of a bounce');
INSERT INTO "sign" VALUES(31,'weak','envelope','<>|mailer-daemon|mail-daemon|mdaemon',NULL,NULL,'a null or a daemon''s envelope');
INSERT INTO "sign" VALUES(32,'weak','auto-submitted','(?!no$).+',NULL,NULL,'Auto-Submitted');
INSERT INTO "sign" VALUES(33,'forwarded','raw-x-ms-exchange-inbox-rules-loop raw-resent-from raw-x-forwarded-for raw-x-forwarded-to','',NULL,NULL,'a forwarder''s own header');
INSERT INTO "sign" VALUES(34,'withhold','envelope','<>',NULL,NULL,'the envelope sender is null (RFC 3834 2)');
INSERT INTO "sign" VALUES(35,'withhold','from','mailer-?daemon|mail-daemon|mdaemon|post[-_.]?master|.*noreply.*|(?:.*[-_.+])?no[-_.]repl(?:y|ies).*|.*do[-_.]?not[-_.]?reply.*|no[-_.]?respond.*|auto[-_.]?(?:reply|responder)|nobody|abuse|root|listserv|majordomo|mailman|owner-.+|.+-owner|.+-request|.+-bounces?|bounces?(?:[+=-].*)?|(?:prvs|srs[01])=.*',NULL,NULL,'From is an address that is never answered');
INSERT INTO "sign" VALUES(36,'withhold','path','owner-.+|.+-owner|.+-request|.+-bounces?|bounces?(?:[+=-].*)?|.*noreply.*|(?:.*[-_.+])?no[-_.]reply.*',NULL,NULL,'the envelope sender is one that is never answered (RFC 3834 7)');
INSERT INTO "sign" VALUES(37,'withhold','raw-return-path','<>',NULL,NULL,'Return-Path is null (RFC 3834 2)');
INSERT INTO "sign" VALUES(38,'withhold','x-loop x-auto-generated','(?:yes|true|hd-.*)',NULL,NULL,'another helpdesk marks its mail so');
INSERT INTO "sign" VALUES(39,'withhold','x-rt-loop-prevention x-roundup-loop x-otrs-loop','.*',NULL,NULL,'another helpdesk''s own mail');
INSERT INTO "sign" VALUES(40,'withhold','raw-x-auto-response-suppress','(?:.*[,;\s])?(?:all|autoreply)(?:[,;\s].*)?',NULL,NULL,'X-Auto-Response-Suppress asks for none (MS-OXCMAIL 2.1.3.2.20)');
INSERT INTO "sign" VALUES(41,'withhold','verdict top-x-spam-flag top-x-spam-status top-x-mailgun-sflag','(?s:(?:.*\n)?\s*(?:(?:fail|spam|yes)\b.*|(?:[5-9]|\d\d+)(?:\.\d+)?\s*))',NULL,NULL,'the provider takes it for spam');
INSERT INTO "sign" VALUES(42,'withhold','top-authentication-results','.*\bdmarc\s*=\s*fail.*',NULL,NULL,'From may be forged, DMARC failed (RFC 8601 5)');
INSERT INTO "sign" VALUES(43,'machine','x-ours','.+',NULL,NULL,'our own machine');
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
INSERT INTO "ticket" VALUES(1,'T-0EGN-GW50',3,1,'Printer on fire','ada@customer.example','Ada Lovelace','closed',1790000000,1790000120);
INSERT INTO "ticket" VALUES(2,'T-D9J7-AA3F',2,1,'Undeliverable','MAILER-DAEMON@mx.customer.example','','open',1790000180,1790000180);
INSERT INTO "ticket" VALUES(3,'T-Y1NH-46K8',3,1,'日本語 ünd','grace@customer.example','Grace Hopper','open',1790000180,1790000180);
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
CREATE TRIGGER message_ticket AFTER INSERT ON message BEGIN  -- a person's message opens its ticket again
    UPDATE ticket SET updated_at = NEW.received_at, status = iif(NEW.kind = 'human', 'open', status)
    WHERE id = NEW.ticket;
END;
CREATE INDEX message_ticket ON message (ticket);
CREATE INDEX message_thread ON message (email_account, message_id COLLATE NOCASE);
CREATE INDEX attachment_message ON attachment (message);
CREATE INDEX outbox_state ON outbox (state, next_attempt_at);
CREATE INDEX outbox_mailbox ON outbox (mailbox, purpose, created_at);
CREATE INDEX outbox_account ON outbox (email_account, purpose, created_at);
CREATE TRIGGER rejected_again BEFORE INSERT ON rejected WHEN EXISTS (SELECT 1 FROM rejected
    WHERE email_account IS NEW.email_account AND body_sha256 = NEW.body_sha256) BEGIN
    UPDATE rejected SET tries = tries + 1, received_at = NEW.received_at, status = NEW.status, reason = NEW.reason
    WHERE email_account IS NEW.email_account AND body_sha256 = NEW.body_sha256;
    SELECT RAISE(IGNORE);
END;
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
COMMIT;
