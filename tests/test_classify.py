"""Which mail is a person's, and who gets a confirmation: tables, one line for each phenomenon.

A mail that was classified wrongly becomes a file in tests/mail and a line in MAIL. All goes through
both doors, as a raw message and as JSON, and has to come to the same by each.
"""

import base64

import pytest
from doors import DOORS, by_both_doors, deliver, raw_of

from conftest import HERE


def fate(desk, mail):
    """(kind, confirmation) of a mail, the same through both doors."""
    answer = by_both_doors(desk, mail)
    return answer["kind"], answer["confirmation"]


# (file in tests/mail, kind, confirmation, what is special about it)
MAIL = [
    # People.
    ("human-auto-submitted-no.eml", "human", "queued", "RFC 3834 5: no = a person"),
    ("human-auto-submitted-no-comment.eml", "human", "queued", "a comment after the keyword"),
    ("human-auto-submitted-no-parameter.eml", "human", "queued", "a parameter after the keyword"),
    ("human-auto-submitted-no-upper-case.eml", "human", "queued", "keywords know no case"),
    ("human-auto-submitted-no-folded.eml", "human", "queued", "comments and a fold first"),
    ("human-auto-submitted-empty.eml", "human", "queued", "an empty field says nothing"),
    ("human-auto-submitted-no-not-auto.eml", "human", "queued", "the comment is not the keyword"),
    ("human-suppress-dr.eml", "human", "queued", "DR is about delivery reports"),
    ("human-suppress-oof.eml", "human", "queued", "OOF is about vacation replies"),
    ("human-suppress-none.eml", "human", "queued", "None suppresses nothing"),
    ("human-suppress-dr-rn-oof.eml", "human", "queued", "a list without All and AutoReply"),
    ("human-suppress-all.eml", "human", "withheld", "a person on Exchange; obeyed, not classified"),
    ("human-suppress-autoreply.eml", "human", "withheld", "obeyed, not classified"),
    ("human-suppress-list-with-autoreply.eml", "human", "withheld", "one value is enough"),
    ("human-subject-out-of-office-toner.eml", "human", "queued", "the phrase goes on, no colon"),
    ("human-subject-automatic-door.eml", "human", "queued", "a door"),
    ("human-subject-autoreply-does-not-work.eml", "human", "queued", "asks about autoreplies"),
    ("human-subject-failed-mail.eml", "human", "queued", "a bounce subject alone is no bounce"),
    ("human-subject-undelivered.eml", "human", "withheld", "asks about a bounce; no reply to it"),
    ("human-bounce-subject-as-a-reply.eml", "human", "queued", "it answers something"),
    ("human-subject-boss-is-out.eml", "human", "queued", "the sentence goes on after office"),
    ("human-subject-re-out-of-the-office.eml", "human", "queued", "people answer about Bob so"),
    ("human-subject-aw-out-of-office.eml", "human", "queued", "the same in German"),
    ("human-vacation-spanish-subject.eml", "human", "withheld", "fuera de la oficina"),
    ("human-vacation-portuguese-subject.eml", "human", "withheld", "ausência"),
    ("human-vacation-french-absence.eml", "human", "withheld", "message d'absence"),
    ("human-vacation-without-article.eml", "human", "withheld", "X is out of office"),
    ("human-subject-fwd-automatic-reply.eml", "human", "queued", "somebody else's vacation reply"),
    ("human-subject-car-key.eml", "human", "queued", "Auto is a car in German"),
    ("human-vacation-word-in-text.eml", "human", "queued", "the text is not looked at"),
    ("human-forwards-bounce-inline.eml", "human", "queued", "headers in the text are text"),
    ("human-forwards-bounce-attached.eml", "human", "queued", "marks in message/rfc822"),
    ("human-forwards-bounce-fwd-subject.eml", "human", "queued", "Fwd: and the whole bounce"),
    ("human-attaches-delivery-status.eml", "human", "queued", "status part, no second sign"),
    ("human-forwards-vacation-attached.eml", "human", "queued", "marks in message/rfc822"),
    ("human-attaches-list-digest.eml", "human", "queued", "List-Id in a digest's message/rfc822"),
    ("human-attaches-report-like-name.eml", "human", "queued", "file names are not content types"),
    ("list-of-our-own-google-group.eml", "human", "queued", "support@ is itself a group"),
    ("list-of-our-own-mailman.eml", "human", "queued", "support@ is itself a list"),
    ("list-of-our-own-list-id-only.eml", "human", "queued", "List-Id names us"),
    ("list-of-our-own-list-post-only.eml", "human", "queued", "List-Post names us"),
    ("list-of-our-own-rewriting-from.eml", "human", "withheld", "From is our own address"),
    ("human-inbox-rules-loop-alone.eml", "human", "queued", "a rule forwarded a person's mail"),
    ("human-redirected-by-exchange-rule.eml", "human", "queued", "RFC 5322 3.6.6: Resent-*"),
    ("human-redirected-and-suppressed.eml", "human", "withheld", "Resent-*; A-R-S is obeyed"),
    ("human-redirected-with-a-null-path.eml", "human", "withheld", "Resent-*; <> is obeyed"),
    ("human-mailbox-rules-agent-alone.eml", "human", "queued", "a rule's mark alone is no sign"),
    ("human-inbox-rules-loop-dr-oof.eml", "human", "queued", "X-A-R-S without All, AutoReply"),
    ("human-delivered-to.eml", "human", "queued", "Delivered-To is only a way station"),
    ("human-x-loop-of-somebody.eml", "human", "queued", "X-Loop of somebody else's filter"),
    ("human-precedence-empty.eml", "human", "queued", "an empty field says nothing"),
    ("human-precedence-normal.eml", "human", "queued", "nobody's bulk"),
    ("human-precedence-first-class.eml", "human", "queued", "sendmail's word for ordinary"),
    ("human-precedence-urgent.eml", "human", "queued", "urgent is not bulk"),
    ("human-x-autoreply-no.eml", "human", "queued", "says that it is none"),
    ("human-asks-for-a-read-receipt.eml", "human", "queued", "wants an MDN, is none"),
    ("human-resent.eml", "human", "queued", "redirected by a colleague's mail program"),
    ("human-sender-is-the-assistant.eml", "human", "queued", "Sender: and From: differ"),
    ("human-dkim-arc-and-verdicts.eml", "human", "queued", "trace headers with suspicious words"),
    ("human-postmaster.eml", "human", "withheld", "RFC 5230 4.6: people; never answered"),
    ("human-named-mailer-daemon.eml", "human", "queued", "a display name is not an address"),
    ("human-name-with-comma.eml", "human", "queued", "a quoted comma makes no second address"),
    ("human-name-with-at-sign.eml", "human", "queued", "an @ inside the quoted name"),
    ("human-name-encoded-word.eml", "human", "queued", "an RFC 2047 name"),
    ("human-name-encoded-comma.eml", "human", "queued", "a comma comes out of the decoded name"),
    ("human-plus-address.eml", "human", "queued", "a tag of the customer's own"),
    ("human-idn-domain.eml", "human", "queued", "a domain in its ASCII form"),
    ("human-idn-domain-raw-utf-8.eml", "human", "queued", "SMTPUTF8: the domain as written"),
    ("human-local-part-not-ascii.eml", "human", "withheld", "stored; no ASCII way to answer"),
    ("human-local-part-quoted.eml", "human", "withheld", "legal, rare and risky"),
    ("human-address-literal.eml", "human", "withheld", "a domain in brackets"),
    ("human-domain-without-dot.eml", "human", "withheld", "nobody outside can answer that"),
    ("human-two-authors.eml", "human", "withheld", "several From mailboxes"),
    ("human-without-from.eml", "human", "queued", "the envelope sender stands in"),
    ("human-without-from-or-envelope.eml", "human", "withheld", "our stand-in is no daemon"),
    ("human-from-is-a-name-only.eml", "human", "withheld", "nobody to answer"),
    ("human-from-without-brackets.eml", "human", "queued", "one addr-spec is the address"),
    ("human-from-without-brackets-in-quotes.eml", "human", "queued", "behind a quoted name"),
    ("human-name-after-the-address.eml", "human", "queued", "the old comment form of a name"),
    ("human-to-undisclosed-recipients.eml", "human", "queued", "Bcc: we are in no visible header"),
    ("human-no-to-at-all.eml", "human", "queued", "Bcc, and the program wrote no To"),
    ("human-many-recipients.eml", "human", "queued", "one of ten in To and Cc"),
    ("human-return-path-own.eml", "human", "queued", "the envelope sender is the author"),
    ("human-return-path-null-lower.eml", "human", "withheld", "not the envelope, but believed"),
    ("human-return-path-empty.eml", "human", "queued", "no value = unknown, not null"),
    ("human-return-path-owner.eml", "human", "withheld", "a never-answer envelope sender"),
    ("human-null-sender-alone.eml", "human", "withheld", "a null path alone only withholds"),
    ("human-null-sender-of-a-helpdesk.eml", "human", "withheld", "another desk's, no mark"),
    ("human-receipt-in-tnef.eml", "human", "withheld", "Read: in Outlook's own format"),
    ("human-return-path-srs.eml", "human", "queued", "a forwarder's SRS rewrite is fine"),
    ("human-return-path-prvs.eml", "human", "queued", "BATV is fine"),
    ("human-mbox-from-line.eml", "human", "queued", "an mbox separator stands before the headers"),
    ("human-header-names-in-lower-case.eml", "human", "queued", "header names know no case"),
    ("human-japanese-iso-2022-jp.eml", "human", "queued", "base64 words, 7-bit body"),
    ("human-japanese-shift-jis.eml", "human", "queued", "a base64 body"),
    ("human-german-quoted-printable.eml", "human", "queued", "umlauts and soft line breaks"),
    ("human-windows-1252-8-bit.eml", "human", "queued", "curly quotes as 8-bit bytes"),
    ("human-russian-koi8-r.eml", "human", "queued", "another 8-bit charset"),
    ("human-chinese-gb18030.eml", "human", "queued", "a Chinese subject that is no vacation reply"),
    ("human-chinese-gb2312.eml", "human", "queued", "says gb2312, holds what only gbk knows"),
    ("human-korean-euc-kr.eml", "human", "queued", "says euc-kr, holds what only cp949 knows"),
    ("human-russian-koi8-r-unlabelled.eml", "human", "queued", "an 8-bit Subject, like the body"),
    ("human-raw-utf-8-headers.eml", "human", "queued", "unencoded UTF-8 in the headers"),
    ("human-8-bit-without-charset.eml", "human", "queued", "latin-1 bytes and nobody says so"),
    ("human-unknown-charset.eml", "human", "queued", "a charset that nobody knows"),
    ("human-broken-encoded-word.eml", "human", "queued", "an encoded word without its end"),
    ("human-emoji-subject.eml", "human", "queued", "four-byte characters"),
    ("human-no-subject.eml", "human", "queued", "no Subject field"),
    ("human-empty-subject-and-text.eml", "human", "queued", "nothing but an address"),
    ("human-very-long-subject.eml", "human", "queued", "900 characters, folded"),
    ("human-html-only.eml", "human", "queued", "no plain text"),
    ("human-alternative-with-inline-image.eml", "human", "queued", "related inside alternative"),
    ("human-photo-and-nothing-else.eml", "human", "queued", "the mail is one image"),
    ("human-signed-smime.eml", "human", "queued", "multipart/signed is no report"),
    ("human-signed-pgp.eml", "human", "queued", "a detached PGP signature"),
    ("human-encrypted-pgp.eml", "human", "queued", "we cannot read it; people can"),
    ("human-boundary-folded.eml", "human", "queued", "the boundary itself on two lines"),
    ("human-boundary-folded-crlf.eml", "human", "queued", "boundary and its = on two lines"),
    ("human-headers-ended-by-blanks.eml", "human", "queued", "the empty line holds blanks"),
    ("human-text-with-a-file-name.eml", "human", "queued", "RFC 2183 2.1: inline, and named"),
    ("human-calendar-invitation.eml", "human", "queued", "a person invites us"),
    ("human-calendar-answer.eml", "human", "queued", "a person pressed Accept"),
    ("human-winmail-dat.eml", "human", "queued", "Outlook's TNEF"),
    ("human-base64-broken.eml", "human", "queued", "an attachment that does not decode"),
    ("human-multipart-without-its-end.eml", "human", "queued", "the closing boundary got lost"),
    ("human-content-type-garbage.eml", "human", "queued", "a Content-Type of one word"),
    ("human-no-mime-at-all.eml", "human", "queued", "RFC 822, 1982"),
    ("human-no-date.eml", "human", "queued", "no Date field"),
    ("human-date-garbage.eml", "human", "queued", "a Date that is none"),
    ("human-no-message-id.eml", "human", "queued", "an id is made from the content"),
    ("human-message-id-garbage.eml", "human", "queued", "an id without brackets and @"),
    ("human-in-reply-to-unknown.eml", "human", "queued", "answers what we never saw"),
    ("human-in-reply-to-empty.eml", "human", "queued", "empty ids match nothing"),
    ("human-tag-of-no-ticket.eml", "human", "queued", "a tag that belongs to no ticket"),
    ("human-tag-in-full-width-brackets.eml", "human", "queued", "the same in full-width brackets"),
    # Nothing but the address says that no person wrote these.
    ("noreply.eml", "human", "withheld", "never-answer address"),
    ("noreply-inside-a-longer-name.eml", "human", "withheld", "anything with noreply"),
    ("no-reply-1234.eml", "human", "withheld", "no-reply with a tail"),
    ("donotreply.eml", "human", "withheld", "never-answer address"),
    ("owner-of-a-list.eml", "human", "withheld", "owner-*"),
    ("owner-of-a-list-plus.eml", "human", "withheld", "list+owner@"),
    ("owner-of-a-list-with-a-tag.eml", "human", "withheld", "list-owner+…@"),
    ("list-request.eml", "human", "withheld", "*-request"),
    ("bounces-verp.eml", "human", "withheld", "bounces+…"),
    ("listserv.eml", "human", "withheld", "a list server's command address"),
    ("majordomo.eml", "human", "withheld", "a list server's command address"),
    ("mailman.eml", "human", "withheld", "a list server's own address"),
    ("root.eml", "human", "withheld", "cron of old, without any mark"),
    ("abuse.eml", "human", "withheld", "a role that answers itself"),
    ("post-master.eml", "human", "withheld", "postmaster, as some spell it"),
    ("human-complaint-loop.eml", "human", "withheld", "a feedback loop in its own format"),
    ("freescout-auto-reply.eml", "human", "queued", "has no mark at all; the caps end the loop"),
    ("own-address.eml", "human", "withheld", "our own address came back to us"),
    ("own-address-plus.eml", "human", "withheld", "our own address with a tag"),
    # Automatic replies.
    ("vacation-gmail.eml", "auto-reply", "withheld", "Precedence: bulk besides, no In-Reply-To"),
    ("vacation-exchange-online.eml", "auto-reply", "withheld", "A-R-S and Rules-Loop only"),
    ("vacation-exchange-online-recent.eml", "auto-reply", "withheld", "Mailbox Rules Agent"),
    ("vacation-exchange-icelandic.eml", "auto-reply", "withheld", "subject in no list; two marks"),
    ("vacation-mailbox-rules-agent-null-path.eml", "auto-reply", "withheld", "with a null path"),
    ("vacation-mailbox-rules-agent-suppress-all.eml", "auto-reply", "withheld", "with A-R-S"),
    ("vacation-exchange-rule.eml", "auto-reply", "withheld", "Rules-Loop with Auto-Submitted"),
    ("vacation-exchange-2003.eml", "auto-reply", "withheld", "nothing but its subject"),
    ("vacation-lotus-notes-old.eml", "auto-reply", "withheld", "nothing but its subject"),
    ("vacation-lotus-notes-returning.eml", "auto-reply", "withheld", "AUTO: and auto-generated"),
    ("vacation-icloud.eml", "auto-reply", "withheld", "X-Apple-Action alone"),
    ("vacation-sieve-dovecot.eml", "auto-reply", "withheld", "a comment in Auto-Submitted"),
    ("vacation-cpanel.eml", "auto-reply", "withheld", "X-Precedence and X-Autorespond"),
    ("vacation-communigate.eml", "auto-reply", "withheld", "X-Autogenerated: Reply"),
    ("vacation-dtc.eml", "auto-reply", "withheld", "X-AutoReply-From and X-Mail-Autoreply"),
    ("vacation-firstclass.eml", "auto-reply", "withheld", "X-FC-MachineGenerated"),
    ("vacation-mailtraq.eml", "auto-reply", "withheld", "vacation mark beats its Return-Path"),
    ("vacation-qmail-autoresponder.eml", "auto-reply", "withheld", "Delivered-To: Autoresponder"),
    ("vacation-mimecast.eml", "auto-reply", "withheld", "null X-A-R-S list, noreply and Reply-To"),
    ("vacation-null-sender.eml", "auto-reply", "withheld", "vacation mark, so no bounce"),
    ("vacation-through-our-own-group.eml", "auto-reply", "withheld", "our list hides nothing"),
    ("vacation-x-vacation.eml", "auto-reply", "withheld", "X-Vacation"),
    ("vacation-x-autoresponder.eml", "auto-reply", "withheld", "X-Autoresponder"),
    ("vacation-x-autoresponse.eml", "auto-reply", "withheld", "X-Autoresponse"),
    ("vacation-x-auto-reply.eml", "auto-reply", "withheld", "X-Auto-Reply"),
    ("vacation-preference-auto-reply.eml", "auto-reply", "withheld", "the misspelt Precedence"),
    ("vacation-precedence-auto-reply.eml", "auto-reply", "withheld", "Precedence in odd case"),
    ("vacation-auto-submitted-x-keyword.eml", "auto-reply", "withheld", "any keyword but no"),
    ("vacation-auto-submitted-owner-email.eml", "auto-reply", "withheld", "comments, parameter"),
    ("vacation-auto-submitted-twice.eml", "auto-reply", "withheld", "first no, then auto-replied"),
    ("vacation-german-subject.eml", "auto-reply", "withheld", "Abwesenheitsnotiz"),
    ("vacation-french-subject.eml", "auto-reply", "withheld", "space before the colon"),
    ("vacation-japanese-subject.eml", "auto-reply", "withheld", "encoded in ISO-2022-JP"),
    ("vacation-chinese-gb2312.eml", "auto-reply", "withheld", "says gb2312, holds gbk"),
    ("vacation-russian-koi8-r-unlabelled.eml", "auto-reply", "withheld", "bytes without a label"),
    ("confirmation-osticket.eml", "auto-reply", "withheld", "another desk confirms"),
    ("confirmation-request-tracker.eml", "auto-reply", "withheld", "another desk confirms"),
    ("receipt-mdn-read.eml", "auto-reply", "withheld", "a read receipt; its From is the person"),
    ("receipt-mdn-deleted-unread.eml", "auto-reply", "withheld", "the same in upper case"),
    # Delivery reports.
    ("bounce-postfix-dsn.eml", "bounce", "withheld", "a delivery report"),
    ("bounce-postfix-delayed.eml", "bounce", "withheld", "a delay is a report too"),
    ("bounce-dsn-relayed.eml", "bounce", "withheld", "a success report"),
    ("bounce-exim-failed-recipients.eml", "bounce", "withheld", "X-Failed-Recipients, no MIME"),
    ("bounce-failed-recipients-alone.eml", "bounce", "withheld", "no other mark"),
    ("bounce-sendmail.eml", "bounce", "withheld", "auto-generated does not make it a machine's"),
    ("bounce-exchange.eml", "bounce", "withheld", "From a postmaster, as RFC 3464 likes it"),
    ("bounce-gmail.eml", "bounce", "withheld", "with X-Failed-Recipients and a report"),
    ("bounce-report-envelope-unknown.eml", "bounce", "withheld", "the report type alone suffices"),
    ("bounce-qmail.eml", "bounce", "withheld", "plain text from MAILER-DAEMON"),
    ("bounce-mdaemon.eml", "bounce", "withheld", "an MDaemon server"),
    ("bounce-mail-daemon.eml", "bounce", "withheld", "mail-daemon, another spelling"),
    ("bounce-daemon-auto-replied.eml", "bounce", "withheld", "RFC 3834 5.2 knows the misuse"),
    ("bounce-daemon-auto-replied-in-part.eml", "bounce", "withheld", "a comment, and bulk besides"),
    ("bounce-return-path-mailer-daemon.eml", "bounce", "withheld", "RFC 3834 7"),
    ("bounce-from-empty.eml", "bounce", "withheld", "From: <> and a bounce subject"),
    ("bounce-postmaster-with-subject.eml", "bounce", "withheld", "postmaster and a bounce subject"),
    ("bounce-postmaster-null-sender.eml", "bounce", "withheld", "postmaster and the null sender"),
    ("bounce-status-part-in-mixed.eml", "bounce", "withheld", "status part and bounce subject"),
    ("bounce-report-without-report-type.eml", "bounce", "withheld", "RFC 6522, half obeyed"),
    ("bounce-postmaster-with-status-part.eml", "bounce", "withheld", "with a status part"),
    ("bounce-sieve-reject-mdn.eml", "bounce", "withheld", "an MDN that says rejected"),
    ("bounce-arf-complaint.eml", "bounce", "withheld", "somebody pressed Spam: a feedback report"),
    # Machines.
    ("machine-zendesk-agent.eml", "machine", "withheld", "Zendesk stamps all its mail"),
    ("machine-zendesk-notification.eml", "machine", "withheld", "the same on a confirmation"),
    ("machine-jira.eml", "machine", "withheld", "Precedence: bulk besides"),
    ("machine-zammad-confirmation.eml", "machine", "withheld", "says auto-generated"),
    ("machine-exchange-transport-rule.eml", "machine", "withheld", "not the Mailbox Rules Agent"),
    ("machine-cron.eml", "machine", "withheld", "Vixie cron today"),
    ("machine-sieve-notify.eml", "machine", "withheld", "the third registered keyword"),
    ("machine-monitoring-comment.eml", "machine", "withheld", "a comment and odd case"),
    ("machine-auto-submitted-twice.eml", "machine", "withheld", "first no, then auto-generated"),
    ("machine-auto-submitted-colon-twice.eml", "machine", "withheld", "`: : auto-generated`"),
    ("machine-complaint-x-arf.eml", "machine", "withheld", "X-ARF, a complaint that is no ARF"),
    ("machine-complaint-feedback-type.eml", "machine", "withheld", "RFC 5965's field on top"),
    # Lists.
    ("list-mailman.eml", "list", "withheld", "a list of somebody else"),
    ("list-groups-io.eml", "list", "withheld", "Mailing-List and Precedence: Bulk"),
    ("list-google-group-of-others.eml", "list", "withheld", "we are a member of it"),
    ("list-post-only.eml", "list", "withheld", "List-Post of a foreign list"),
    ("list-archive-only.eml", "list", "withheld", "List-Archive alone"),
    ("list-owner-only.eml", "list", "withheld", "List-Owner alone"),
    ("list-beenthere-only.eml", "list", "withheld", "X-BeenThere alone"),
    ("list-precedence-list.eml", "list", "withheld", "Precedence: LIST, odd case"),
    ("list-of-our-domain-but-not-ours.eml", "list", "withheld", "another address of our domain"),
    ("list-named-nearly-like-ours.eml", "list", "withheld", "our name is only a part of it"),
    # Bulk.
    ("newsletter-list-unsubscribe.eml", "bulk", "withheld", "List-Unsubscribe alone"),
    ("newsletter-campaign.eml", "bulk", "withheld", "X-CampaignID"),
    ("newsletter-csa.eml", "bulk", "withheld", "X-CSA-Complaints"),
    ("app-feedback-id.eml", "bulk", "withheld", "an application that mails through a provider"),
    ("crm-list-unsubscribe.eml", "bulk", "withheld", "hand-written, the CRM marks it"),
    ("precedence-bulk.eml", "bulk", "withheld", "Precedence: bulk alone, odd case"),
    ("precedence-junk-procmail.eml", "bulk", "withheld", "procmail's vacation recipe"),
    ("vacation-program.eml", "bulk", "withheld", "vacation(1): only Precedence"),
    ("x-precedence-bulk.eml", "bulk", "withheld", "the X- spelling, after an ordinary one"),
]


@pytest.mark.parametrize("name, kind, confirmation, why", MAIL, ids=[row[0] for row in MAIL])
def test_every_mail_is_taken_for_what_it_is(bare, name, kind, confirmation, why):
    answer = by_both_doors(bare, (HERE / "mail" / name).read_bytes())
    assert (answer["kind"], answer["confirmation"]) == (kind, confirmation), (why, answer["reason"])


def test_the_table_covers_every_mail_and_most_of_them_are_of_people():
    names = [name for name, *_ in MAIL]
    assert sorted(names) == sorted(file.name for file in (HERE / "mail").iterdir())
    assert len(names) >= 80
    assert sum(kind == "human" for _, kind, *_ in MAIL) * 2 >= len(names)


# Headers ------------------------------------------------------------------------------------------

# (value, list = repeated field, kind). RFC 3834 5: any keyword but "no" is automatic.
AUTO_SUBMITTED = [
    (None, "human"),
    ("", "human"),
    ("   ", "human"),
    ("(only a comment)", "human"),
    ("no", "human"),
    ("No", "human"),
    (" NO ", "human"),
    ('"no"', "human"),
    ("no (a person wrote this)", "human"),
    ("no(glued)", "human"),
    ("(a person) no", "human"),
    ("(a (nested) comment) no", "human"),
    ("no (auto-replied)", "human"),
    ("no; x=y", "human"),
    ("no;x=auto-replied", "human"),
    ("no ; owner-email=\"ada@customer.example\"", "human"),
    ("\r\n no", "human"),
    (["no", "no"], "human"),
    (["", "no"], "human"),
    ("auto-replied", "auto-reply"),
    ("Auto-Replied", "auto-reply"),
    ("AUTO-REPLIED", "auto-reply"),
    ("auto-replied (vacation)", "auto-reply"),
    ("auto-replied(vacation)", "auto-reply"),
    ("(no) auto-replied", "auto-reply"),
    ("auto-replied (no)", "auto-reply"),
    ("auto-replied; reason=no", "auto-reply"),
    ("auto-replied; owner-email=\"ada@customer.example\"", "auto-reply"),
    ("x-holiday", "auto-reply"),
    ("nobody-knows-this", "auto-reply"),
    (["no", "auto-replied"], "auto-reply"),
    (["auto-replied", "no"], "auto-reply"),
    (["auto-generated", "auto-replied"], "auto-reply"),
    ("auto-generated", "machine"),
    ("Auto-Generated", "machine"),
    ("auto-generated (cron)", "machine"),
    ("auto-generated; x=no", "machine"),
    ("\r\n\tauto-generated", "machine"),
    ("auto-notified", "machine"),
    ("auto-notified; owner-token=af3b", "machine"),
    (": auto-generated", "machine"),  # written `Auto-Submitted: : auto-generated`
    (": auto-replied", "auto-reply"),
    (": no", "human"),
    (["no", "auto-generated"], "machine"),
]


@pytest.mark.parametrize("value, kind", AUTO_SUBMITTED, ids=repr)
def test_auto_submitted_is_read_by_its_keyword(bare, value, kind):
    assert fate(bare, bare.mail(headers={"Auto-Submitted": value}))[0] == kind


# (value, list = repeated field, kind), the same for each of the three names.
PRECEDENCE = [
    (None, "human"),
    ("", "human"),
    ("normal", "human"),
    ("first-class", "human"),
    ("special-delivery", "human"),
    ("urgent", "human"),
    ("bulky", "human"),
    ("playlist", "human"),
    ("bulk", "bulk"),
    ("Bulk", "bulk"),
    (" BULK ", "bulk"),
    ("junk", "bulk"),
    ("JuNk", "bulk"),
    (["normal", "bulk"], "bulk"),
    ("list", "list"),
    ("List", "list"),
    ("auto_reply", "auto-reply"),
    ("Auto_Reply", "auto-reply"),
    (["bulk", "auto_reply"], "auto-reply"),
]


@pytest.mark.parametrize("name", ["Precedence", "X-Precedence"])
@pytest.mark.parametrize("value, kind", PRECEDENCE, ids=repr)
def test_precedence_is_compared_without_case(bare, name, value, kind):
    assert fate(bare, bare.mail(headers={name: value}))[0] == kind


# (value, list = repeated field, confirmation). MS-OXCMAIL 2.1.3.2.20: it speaks of replies to it.
SUPPRESS = [
    (None, "queued"),
    ("", "queued"),
    ("None", "queued"),
    ("DR", "queued"),
    ("NDR", "queued"),
    ("RN", "queued"),
    ("NRN", "queued"),
    ("OOF", "queued"),
    ("DR, NDR, RN, NRN, OOF", "queued"),
    ("DR,OOF", "queued"),
    ("Allowed", "queued"),
    ("All", "withheld"),
    ("ALL", "withheld"),
    (" all ", "withheld"),
    ("AutoReply", "withheld"),
    ("autoreply", "withheld"),
    ("OOF, AutoReply", "withheld"),
    ("OOF,AutoReply", "withheld"),
    ("DR, RN, NRN, OOF, AutoReply", "withheld"),
    (["DR", "AutoReply"], "withheld"),
]


@pytest.mark.parametrize("value, confirmation", SUPPRESS, ids=repr)
def test_suppressing_answers_withholds_ours_and_never_classifies(bare, value, confirmation):
    mail = bare.mail(headers={"X-Auto-Response-Suppress": value})
    assert fate(bare, mail) == ("human", confirmation)


# (header, value, kind)
HEADERS = [
    ("Subject", "Printer on fire", "human"),
    ("Delivered-To", "support@helpdesk.example", "human"),
    ("Delivered-To", "Autoresponder", "auto-reply"),
    ("Preference", "auto_reply", "auto-reply"),
    ("Preference", "none", "human"),
    ("X-Autoreply", "yes", "auto-reply"),
    ("x-autoreply", "YES", "auto-reply"),
    ("X-Autoreply", "no", "human"),
    ("X-Autoreply", "No", "human"),
    ("X-Autoreply", "false", "human"),
    ("X-Autoreply", "0", "human"),
    ("X-Autorespond", "Printer on fire", "auto-reply"),
    ("X-Autoresponder", "yes", "auto-reply"),
    ("X-Autoresponse", "yes", "auto-reply"),
    ("X-AutoReply-From", "ada@customer.example", "auto-reply"),
    ("X-Mail-Autoreply", "yes", "auto-reply"),
    ("X-Auto-Reply", "yes", "auto-reply"),
    ("X-Vacation", "yes", "auto-reply"),
    ("X-Vacation", "false", "human"),
    ("X-Autogenerated", "Reply", "auto-reply"),
    ("X-FC-MachineGenerated", "true", "auto-reply"),
    ("X-FC-MachineGenerated", "false", "human"),
    ("X-POST-MessageClass", "9; Autoresponder", "auto-reply"),
    ("X-POST-MessageClass", "1; Message", "human"),
    ("X-Apple-Action", "VACATION", "auto-reply"),
    ("X-Apple-Action", "JUNK_TO_INBOX/INBOX", "human"),
    ("X-MS-Exchange-Inbox-Rules-Loop", "ada@customer.example", "human"),
    ("X-MS-Exchange-Generated-Message-Source", "Mailbox Rules Agent", "human"),  # redirected
    ("X-MS-Exchange-Generated-Message-Source", "Journal Agent", "machine"),
    ("X-Failed-Recipients", "bob@customer.example", "bounce"),
    ("X-Loop", "ada@customer.example", "human"),
    ("X-ARF", "YES", "machine"),
    ("X-ARF", "yes", "machine"),
    ("Feedback-Type", "abuse", "machine"),
    ("Feedback-Type", "opt-out", "machine"),
    ("List-Id", "", "human"),           # some providers post all that they know, empty or not
    ("List-Unsubscribe", " ", "human"),
    ("Feedback-ID", "", "human"),
    ("List-Id", "Talk <talk.lists.example.org>", "list"),
    ("List-Id", "talk.lists.example.org", "list"),
    ("List-Id", "Support <support.helpdesk.example>", "human"),
    ("List-Id", "support.helpdesk.example", "human"),
    ("List-Id", "<SUPPORT.Helpdesk.Example>", "human"),
    ("List-Id", "support.helpdesk.example <talk.lists.example.org>", "list"),
    ("List-Id", "<support.helpdesk.example.lists.example.org>", "list"),
    ("List-Post", "<mailto:talk@lists.example.org>", "list"),
    ("List-Post", "<mailto:support@helpdesk.example>", "human"),
    ("List-Owner", "<mailto:boss@lists.example.org>", "list"),
    ("List-Archive", "<https://lists.example.org/archive>", "list"),
    ("List-Help", "<mailto:help@lists.example.org>", "list"),
    ("List-Subscribe", "<mailto:join@lists.example.org>", "list"),
    ("Mailing-List", "list talk@lists.example.org; contact boss@lists.example.org", "list"),
    ("X-BeenThere", "talk@lists.example.org", "list"),
    ("X-BeenThere", "support@helpdesk.example", "human"),
    ("X-Mailman-Version", "2.1.39", "list"),
    ("List-Unsubscribe", "<https://toner.example/u/1>", "bulk"),
    ("List-Unsubscribe-Post", "List-Unsubscribe=One-Click", "bulk"),
    ("Feedback-ID", "1.eu-central-1.AAAA=:Provider", "bulk"),
    ("X-CampaignID", "88-1", "bulk"),
    ("X-CSA-Complaints", "csa-complaints@complaints.example", "bulk"),
]


@pytest.mark.parametrize("name, value, kind", HEADERS)
def test_a_header_alone_decides_or_does_not(bare, name, value, kind):
    mail = bare.mail(headers={name: value})
    assert fate(bare, mail) == (kind, "queued" if kind == "human" else "withheld")


@pytest.mark.parametrize("name", ["Feedback-ID", "X-CampaignID", "X-CSA-Complaints"])
def test_a_list_of_our_own_hides_no_mass_mailing(bare, name):
    ours = {"List-Id": "<support.helpdesk.example>", "List-Unsubscribe": "<mailto:off@x.example>"}
    assert fate(bare, bare.mail(headers=ours)) == ("human", "queued")
    assert fate(bare, bare.mail(headers=ours | {name: "88-1"})) == ("bulk", "withheld")


AGENT = {"X-MS-Exchange-Generated-Message-Source": "Mailbox Rules Agent"}
RESENT = {"Resent-From": "team@customer.example", "Resent-To": "support@helpdesk.example"}
ALL, NULL = {"X-Auto-Response-Suppress": "All"}, {"from": ""}

# (headers, envelope, kind, confirmation). Exchange's Mailbox Rules Agent redirects people's mail
# far oftener than it writes some of its own.
RULES = [
    (AGENT, None, "human", "queued"),
    (AGENT | RESENT, None, "human", "queued"),
    (AGENT | RESENT, {"from": "team@customer.example"}, "human", "queued"),
    (AGENT | RESENT | ALL, None, "human", "withheld"),
    (AGENT | RESENT, NULL, "human", "withheld"),
    (AGENT | {"X-Auto-Response-Suppress": "DR, OOF, AutoReply"}, None, "auto-reply", "withheld"),
    (AGENT | ALL, None, "auto-reply", "withheld"),
    (AGENT, NULL, "auto-reply", "withheld"),
    (AGENT | ALL, NULL, "auto-reply", "withheld"),
]


@pytest.mark.parametrize("headers, envelope, kind, confirmation", RULES)
def test_what_an_exchange_rule_redirected_is_still_a_person_s(bare, headers, envelope, kind,
                                                             confirmation):
    mail = bare.mail(headers=headers, envelope=envelope)
    assert fate(bare, mail) == (kind, confirmation)


def test_what_a_trusted_forwarder_stamped_does_not_count(desk):
    lists = {"List-Id": "<team.customer.example>", "List-Post": "<mailto:team@customer.example>"}
    rule = AGENT | ALL | {"X-MS-Exchange-Inbox-Rules-Loop": "team@customer.example"}
    assert fate(desk, desk.mail(headers=lists)) == ("list", "withheld")
    assert fate(desk, desk.mail(headers=rule)) == ("auto-reply", "withheld")
    desk.execute("UPDATE email_account SET trusted_forwarders = ?",
                 "it@group.example, team@customer.example")
    assert fate(desk, desk.mail(headers=lists)) == ("human", "queued")
    assert fate(desk, desk.mail(headers=rule))[0] == "human"


# What version 1 called the facts that it knew itself; a header of that name is just a header.
MADE_UP = [
    ("Envelope", "<>"),
    ("Envelope", "mailer-daemon"),
    ("Envelope-From", "<>"),
    ("Path", "<>"),
    ("Path", "owner-staff"),
    ("Mail-From", "mailer-daemon@mx.example"),
    ("Mail-From", "team@customer.example"),
    ("Verdict", "spam"),
    ("Verdict", "fail"),
    ("Part", "message/delivery-status"),
    ("Weak", "the subject of a bounce"),
    ("Raw-Content-Type", "multipart/report; report-type=delivery-status"),
    ("Raw-Auto-Submitted", "rejected"),
    ("Raw-Return-Path", "<>"),
    ("Raw-X-Auto-Response-Suppress", "All"),
    ("Top-X-Spam-Flag", "YES"),
    ("Top-Authentication-Results", "mx.example; dmarc=fail"),
    ("From-Address", "mailer-daemon"),
    ("Local-Part", "noreply"),
    ("Kind", "bounce"),
    ("Null-Path", "yes"),
    ("Is-Null", "1"),
]


@pytest.mark.parametrize("name, value", MADE_UP)
def test_a_header_named_like_what_we_know_ourselves_changes_nothing(bare, name, value):
    plain = by_both_doors(bare, bare.mail())
    answer = by_both_doors(bare, bare.mail(headers={name: value, name.lower(): value}))
    for word in ("kind", "confirmation", "reason"):
        assert answer[word] == plain[word]
    assert (answer["kind"], answer["confirmation"]) == ("human", "queued")


def test_nor_do_all_of_them_at_once(bare):
    assert fate(bare, bare.mail(headers=[list(pair) for pair in MADE_UP])) == ("human", "queued")


@pytest.mark.parametrize("name, value", MADE_UP)
def test_nor_does_it_help_where_another_sign_waits_for_a_second_one(bare, name, value):
    """The two tests of one rule look at what was sent, not at each other's names."""
    status = {"content_type": "message/delivery-status", "filename": "details.txt",
              "content": base64.b64encode(b"Reporting-MTA: dns; mx.customer.example\n").decode()}
    mail = bare.mail(headers={name: value}, attachments=[status])
    assert fate(bare, mail) == ("human", "queued")
    mail = bare.mail(headers={name: value}, **{"from": "postmaster@customer.example"})
    assert fate(bare, mail) == ("human", "withheld")


# Subjects -----------------------------------------------------------------------------------------

# (subject, kind). RFC 3834 3.1.5 warns of subjects: the phrase ends in a colon or is all of it.
SUBJECTS = [
    ("Automatic reply: Printer on fire", "auto-reply"),
    ("automatic reply:", "auto-reply"),
    ("AUTOMATIC REPLY : Printer", "auto-reply"),
    ("Automatic reply", "auto-reply"),
    ("[Ticket 17] Automatic reply: Printer", "auto-reply"),
    ("Auto reply: Printer", "auto-reply"),
    ("Auto response: Printer", "auto-reply"),
    ("Automatic response: Printer", "auto-reply"),
    ("Out of office", "auto-reply"),
    ("Out of office: Printer", "auto-reply"),
    ("Out of the office: Printer", "auto-reply"),
    ("Out of Office AutoReply: Printer", "auto-reply"),
    ("Out of office reply: Printer", "auto-reply"),
    ("AUTO: Ada is out of the office (returning 03.10.2026)", "auto-reply"),
    ("Auto: Printer on fire", "auto-reply"),
    ("Ada Lovelace is out of the office", "auto-reply"),
    ("Ada Lovelace is out of the office.", "auto-reply"),
    ("Ada Lovelace is out of the office (returning Monday)", "auto-reply"),
    ("Abwesenheitsnotiz: Drucker", "auto-reply"),
    ("Abwesenheitsnotiz", "auto-reply"),
    ("Réponse automatique : imprimante", "auto-reply"),
    ("Réponse automatique\u00a0: imprimante", "auto-reply"),
    ("Respuesta automática: impresora", "auto-reply"),
    ("RESPUESTA AUTOMÁTICA: impresora", "auto-reply"),
    ("Automatisk svar: skriver", "auto-reply"),
    ("Automatisch antwoord: printer", "auto-reply"),
    ("Frånvaro: skrivare", "auto-reply"),
    ("Fuori sede: stampante", "auto-reply"),
    ("自動応答: プリンター", "auto-reply"),
    ("自動応答：プリンター", "auto-reply"),  # with a full-width colon
    ("自动回复: 打印机", "auto-reply"),
    ("自动答复: 打印机", "auto-reply"),     # Exchange's own words in each language, from here
    ("자동 회신: 프린터", "auto-reply"),
    ("Otomatik yanıt: yazıcı", "auto-reply"),
    ("Răspuns automat: imprimantă", "auto-reply"),
    ("Αυτόματη απάντηση: εκτυπωτής", "auto-reply"),
    ("Автоматична відповідь: принтер", "auto-reply"),
    ("Автоматический ответ: принтер", "auto-reply"),
    ("Automatická odpoveď: tlačiareň", "auto-reply"),
    ("=?utf-8?B?6Ieq5Yqo5Zue5aSNOiDmiZPljbDmnLo=?=", "auto-reply"),  # the same, still encoded
    ("Re: Automatic reply: Printer", "human"),  # that is how a person answers one
    ("RE: re: Automatic reply: Printer", "human"),
    ("AW: Abwesenheitsnotiz: Drucker", "human"),
    ("Re: Ada Lovelace is out of the office", "human"),
    ("Out of office; how do I set it up?", "human"),
    ("Out of office (printer toner)", "human"),
    ("Automatic reply; does it work?", "human"),
    ("Automatic reply (or none)", "human"),
    ("Out of office printer toner", "human"),
    ("Out of office hours, whom do I call?", "human"),
    ("Automatic door broken", "human"),
    ("Automatic reply does not work", "human"),
    ("Automatic replies: how do I set them up?", "human"),
    ("Autoreply does not work", "human"),
    ("Auto insurance", "human"),
    ("Automobile: new brakes", "human"),
    ("Autobahn: Stau", "human"),
    ("How do I end an automatic reply: which button?", "human"),
    ("Fwd: Automatic reply: Printer", "human"),
    ("WG: Abwesenheitsnotiz: Drucker", "human"),
    ("Is Ada out of the office", "human"),
    ("My boss is out of the office and I need his key", "human"),
    ("Abwesenheitsnotiz einrichten", "human"),
    ("Réponse automatique défectueuse", "human"),
    ("La respuesta automática: no funciona", "human"),
    ("Automatisk svar fungerer ikke", "human"),
    ("Automatisch antwoord instellen", "human"),
    ("Frånvarorapport: saknas", "human"),
    ("Fuori sede non posso stampare", "human"),
    ("自動応答が止まりません", "human"),
    ("自动回复怎么设置", "human"),
    ("Failed Mail", "human"),
    ("Undeliverable: Printer on fire", "human"),
    ("Undelivered Mail Returned to Sender", "human"),
    ("Returned mail: see transcript for details", "human"),
    ("Delivery Status Notification (Failure)", "human"),
    ("failure notice", "human"),
    ("", "human"),
]


@pytest.mark.parametrize("subject, kind", SUBJECTS)
def test_a_subject_is_automatic_only_with_the_whole_phrase(bare, subject, kind):
    assert fate(bare, bare.mail(subject=subject))[0] == kind


def test_a_second_subject_is_not_looked_at(bare):
    """RFC 5322 3.6: there is one; the first is what people see."""
    raw = (b"Received: by mx.example\nFrom: ada@customer.example\nMessage-ID: <two@x.example>\n"
           b"Subject: Printer on fire\nSubject: Automatic reply: Printer\n\nIt burns.\n")
    assert fate(bare, raw) == ("human", "queued")


ANSWERED = "<never.seen@elsewhere.example>"

# (subject, In-Reply-To, confirmation). Words too weak to classify by, strong enough to keep still.
QUIET = [
    # What a vacation responder writes, in words that people use as well.
    ("Fuera de la oficina", None, "withheld"),
    ("Fuera de la oficina: impresora", None, "withheld"),
    ("Estoy fuera de la oficina", None, "withheld"),
    ("Ana Ruiz está fuera de la oficina", None, "withheld"),
    ("FUERA DE LA OFICINA", None, "withheld"),
    ("Ausência", None, "withheld"),
    ("Ausência do escritório: impressora", None, "withheld"),
    ("Aviso de ausência", None, "withheld"),
    ("Ada Lovelace is out of office", None, "withheld"),
    ("Ada Lovelace is out of office until Monday", None, "withheld"),
    ("Ada Lovelace est absent", None, "withheld"),
    ("Ada Lovelace est absente", None, "withheld"),
    ("Ada Lovelace est absent(e)", None, "withheld"),
    ("Message d'absence", None, "withheld"),
    ("Message d’absence : imprimante", None, "withheld"),
    # Behind an answer's prefix a person speaks about somebody who is away.
    ("Re: Bob is out of the office", None, "queued"),
    ("RE: Bob is out of office", None, "queued"),
    ("AW: Bob is out of the office", None, "queued"),
    ("Re: AW: Bob is out of office", None, "queued"),
    ("Re: Fuera de la oficina", None, "queued"),
    ("RE: Message d'absence", None, "queued"),
    ("Re: Ada Lovelace est absente", None, "queued"),
    ("Re: Ausência", None, "queued"),
    # What a mailer daemon writes, from somebody whose address says nothing.
    ("Undelivered Mail Returned to Sender", None, "withheld"),
    ("Mail delivery failed: returning message to sender", None, "withheld"),
    ("Delivery Status Notification (Failure)", None, "withheld"),
    ("Returned mail: see transcript for details", None, "withheld"),
    ("failure notice", None, "withheld"),
    ("Undeliverable: Printer on fire", None, "withheld"),
    ("Unzustellbar: Drucker", None, "withheld"),
    # It answers something, so somebody sat there; and what is forwarded was somebody else's.
    ("Undelivered Mail Returned to Sender", ANSWERED, "queued"),
    ("failure notice", ANSWERED, "queued"),
    ("Fwd: Undelivered Mail Returned to Sender", None, "queued"),
    ("Fwd: failure notice", None, "queued"),
    ("Failed Mail", None, "queued"),
    ("Our delivery of Monday", None, "queued"),
    ("The printer is out of order", None, "queued"),
    ("The office is out of paper", None, "queued"),
]


@pytest.mark.parametrize("subject, in_reply_to, confirmation", QUIET)
def test_a_subject_may_withhold_without_a_word_about_the_kind(bare, subject, in_reply_to,
                                                              confirmation):
    mail = bare.mail(subject=subject, in_reply_to=in_reply_to)
    if in_reply_to:
        mail["headers"] = {"In-Reply-To": in_reply_to}
    assert fate(bare, mail) == ("human", confirmation)


# The gate: who gets a confirmation (SPEC 3.6) -----------------------------------------------------

# (From, confirmation): all of them human.
ADDRESSES = [
    ("ada@customer.example", "queued"),
    ("Ada Lovelace <ada+tag@customer.example>", "queued"),
    ('"Lovelace, Ada" <ada@customer.example>', "queued"),
    ("MAILER-DAEMON <ada@customer.example>", "queued"),
    ("o'neill@customer.example", "queued"),
    ("ada@bücher.example", "queued"),
    ("ada@xn--bcher-kva.example", "queued"),
    ("bounceback.kid@customer.example", "queued"),
    ("bouncer@club.example", "queued"),
    ("bouncy-castle@hire.example", "queued"),
    ("norbert.reply@customer.example", "queued"),
    ("reply@customer.example", "queued"),
    ("rooter@customer.example", "queued"),
    ("rootbeer@customer.example", "queued"),
    ("abuser@customer.example", "queued"),
    ("owner@shop.example", "queued"),
    ("homeowner@customer.example", "queued"),
    ("ownership@customer.example", "queued"),
    ("ada+ownership@customer.example", "queued"),
    ("request@customer.example", "queued"),
    ("requests@customer.example", "queued"),
    ("majordomo.fan@customer.example", "queued"),
    ("mailmanager@customer.example", "queued"),
    ("ada@noreply.example", "queued"),
    ("ada@root.abuse.example", "queued"),
    ("supporter@helpdesk.example", "queued"),
    ("ada@helpdesk.example", "queued"),
    ("support@customer.example", "queued"),
    ("support@helpdesk.example", "withheld"),
    ("SUPPORT@HELPDESK.EXAMPLE", "withheld"),
    ("support+tag@helpdesk.example", "withheld"),
    ("Support+T-7F3K-9Q2M@helpdesk.example", "withheld"),
    ("noreply@shop.example", "withheld"),
    ("NoReply@shop.example", "withheld"),
    ("noreply+17@shop.example", "withheld"),
    ("forms-receipts-noreply@shop.example", "withheld"),
    ("noreply.orders@shop.example", "withheld"),
    ("no-reply@shop.example", "withheld"),
    ("no-reply-1234@shop.example", "withheld"),
    ("donotreply@shop.example", "withheld"),
    ("DoNotReply-7@shop.example", "withheld"),
    ("postmaster@customer.example", "withheld"),
    ("Postmaster@customer.example", "withheld"),
    ("post-master@customer.example", "withheld"),
    ("post_master@customer.example", "withheld"),
    ("post.master@customer.example", "withheld"),
    ("abuse@customer.example", "withheld"),
    ("root@customer.example", "withheld"),
    ("listserv@lists.example.org", "withheld"),
    ("majordomo@lists.example.org", "withheld"),
    ("mailman@lists.example.org", "withheld"),
    ("owner-talk@lists.example.org", "withheld"),
    ("talk-owner@lists.example.org", "withheld"),
    ("talk-owner+17@lists.example.org", "withheld"),
    ("talk+owner@lists.example.org", "withheld"),
    ("talk-request@lists.example.org", "withheld"),
    ("talk-bounces@lists.example.org", "withheld"),
    ("talk-bounces+ada=customer.example@lists.example.org", "withheld"),
    ("bounce@mailer.example", "withheld"),
    ("bounces@mailer.example", "withheld"),
    ("bounce+17@mailer.example", "withheld"),
    ("bounces+17-ada=customer.example@mailer.example", "withheld"),
    ("bounce-17@mailer.example", "withheld"),
    ("bounces=17@mailer.example", "withheld"),
    ("jürgen@customer.example", "withheld"),
    ('"ada lovelace"@customer.example', "withheld"),
    ("ada@[192.0.2.1]", "withheld"),
    ("ada@[IPv6:2001:db8::1]", "withheld"),
    ("ada@localhost", "withheld"),
    ("Ada <ada@customer.example>, Bob <bob@customer.example>", "withheld"),
]


@pytest.mark.parametrize("address, confirmation", ADDRESSES)
def test_an_address_that_cannot_or_must_not_be_answered_is_not(bare, address, confirmation):
    assert fate(bare, bare.mail(**{"from": address})) == ("human", confirmation)
    assert bare.count("outbox") == (confirmation == "queued")


@pytest.mark.parametrize("address", ["mailer-daemon@mx.example", "MAILER-DAEMON@mx.example",
                                     "mail-daemon@mx.example", "MDaemon@mx.example"])
def test_a_daemon_s_address_makes_a_bounce(bare, address):
    for headers in ({}, {"Auto-Submitted": "auto-replied"}, {"Auto-Submitted": "auto-generated"}):
        mail = bare.mail(**{"from": address}, headers=headers)
        assert fate(bare, mail) == ("bounce", "withheld")


@pytest.mark.parametrize("written", ["MAILER-DAEMON", "Mail System <MAILER-DAEMON>",
                                     "<mailer-daemon>", "MAILER-DAEMON (Mail System)"])
def test_a_daemon_needs_no_domain_but_has_to_be_written_there(bare, written):
    raw = (f"Received: by mx.example\nFrom: {written}\nTo: support@helpdesk.example\n"
           "Subject: Printer\nMessage-ID: <daemon@customer.example>\n\nIt burns.\n")
    assert fate(bare, raw.encode()) == ("bounce", "withheld")


# (envelope.from, kind, confirmation)
ENVELOPES = [
    (None, "human", "queued"),  # nobody told us
    ("ada@customer.example", "human", "queued"),
    ("prvs=0123abcdef=ada@customer.example", "human", "queued"),
    ("SRS0=HHH1=TT=customer.example=ada@forwarder.example", "human", "queued"),
    ("owner-staff@lists.customer.example", "human", "withheld"),
    ("staff-bounces+ada=customer.example@lists.customer.example", "human", "withheld"),
    ("", "human", "withheld"),  # alone it says that nobody wants an answer, not who wrote
    ("<>", "human", "withheld"),
    ("MAILER-DAEMON@mx.customer.example", "bounce", "withheld"),
]


@pytest.mark.parametrize("envelope_from, kind, confirmation", ENVELOPES)
def test_the_null_sender_is_never_answered(bare, envelope_from, kind, confirmation):
    envelope = {"from": envelope_from, "to": ["support@helpdesk.example"]}
    assert fate(bare, bare.mail(envelope=envelope)) == (kind, confirmation)


# (other fields, kind) of a mail with a null path.
BESIDE_NULL = [
    ({"subject": "Automatic reply: Printer"}, "auto-reply"),
    ({"headers": {"X-Vacation": "yes"}}, "auto-reply"),
    ({"headers": {"Auto-Submitted": "auto-replied"}}, "auto-reply"),
    ({"headers": {"X-Failed-Recipients": "bob@customer.example"}}, "bounce"),
    ({"from": "postmaster@customer.example"}, "bounce"),
    ({"from": "MAILER-DAEMON@mx.customer.example"}, "bounce"),
    ({"subject": "Undelivered Mail Returned to Sender"}, "bounce"),
    ({"headers": {"Auto-Submitted": "auto-generated"}}, "machine"),
    ({"headers": {"Precedence": "bulk"}}, "bulk"),
    ({"subject": "Read: Printer on fire"}, "human"),
]


@pytest.mark.parametrize("fields, kind", BESIDE_NULL)
def test_a_null_path_beside_another_sign_is_what_the_other_says(bare, fields, kind):
    assert fate(bare, bare.mail(envelope={"from": ""}, **fields)) == (kind, "withheld")


@pytest.mark.parametrize("door", DOORS)
def test_two_headers_from_are_two_authors(bare, door):
    headers = [["From", "ada@customer.example"], ["From", "bob@customer.example"]]
    mail = raw_of({"headers": headers, "message_id": "<two@customer.example>", "text": "It burns."})
    answer = deliver(bare, mail, door)
    assert (answer["kind"], answer["confirmation"]) == ("human", "withheld")


@pytest.mark.parametrize("fields", [{"from": "noreply@shop.example"}, {"envelope": {"from": ""}},
                                    {"headers": {"X-Auto-Response-Suppress": "All"}},
                                    {"headers": {"Precedence": "bulk"}}])
def test_a_withheld_confirmation_has_a_reason_and_its_ticket(bare, fields):
    answer = by_both_doors(bare, bare.mail(**fields))
    assert answer["confirmation"] == "withheld" and answer["reason"].strip()
    [message] = bare.show(answer["ticket"])["messages"]
    assert message["confirmation"] == "withheld" and message["reason"].strip()
    assert (bare.count("ticket"), bare.count("outbox")) == (1, 0)


# From of mails whose sender nobody named: what stands in for it is ours, and no sign of anything.
@pytest.mark.parametrize("top", ["Received: by mx.example", "Return-Path: <>"])
@pytest.mark.parametrize("written", [None, "", "Big Bug", "undisclosed:;", "@", "Ada <>"])
def test_a_mail_without_a_usable_from_is_a_person_s_and_gets_a_note(bare, written, top):
    line = "" if written is None else f"From: {written}\n"
    raw = (f"{top}\n{line}To: support@helpdesk.example\nSubject: Printer\n"
           "Message-ID: <nobody@customer.example>\n\nIt burns.\n")
    answer = by_both_doors(bare, raw.encode())
    assert (answer["kind"], answer["confirmation"]) == ("human", "withheld"), answer["reason"]
    [shown] = bare.show(answer["ticket"])["messages"]
    assert any("from" in note.lower() for note in shown["notes"]), shown["notes"]


def confirmations(desk, addresses):
    """Post one mail of its own from each address; return what became of the confirmations."""
    start, found = desk.count("message"), []
    for number, address in enumerate(addresses, start):
        mail = desk.mail(**{"from": address, "message_id": f"<{number}@caps.example>"})
        answer = desk.post(mail)
        assert answer["status"] == "created"
        found.append(answer["confirmation"])
    return found


def test_one_address_gets_three_confirmations_an_hour(desk):
    ada = "ada@customer.example"
    assert confirmations(desk, [ada] * 5) == ["queued"] * 3 + ["withheld"] * 2
    assert confirmations(desk, ["bob@customer.example"]) == ["queued"]
    desk.clock.advance(3599)
    assert confirmations(desk, [ada]) == ["withheld"]
    desk.clock.advance(2)
    assert confirmations(desk, [ada] * 4) == ["queued"] * 3 + ["withheld"]


def test_case_and_name_make_no_other_address(desk):
    spellings = ["ada@customer.example", "Ada <ADA@customer.example>", "<ada@CUSTOMER.EXAMPLE>"]
    assert confirmations(desk, spellings) == ["queued"] * 3
    assert confirmations(desk, ["Ada@Customer.Example"]) == ["withheld"]


def test_one_address_gets_ten_confirmations_a_day(desk):
    for _ in range(10):
        assert confirmations(desk, ["ada@customer.example"]) == ["queued"]
        desk.clock.advance(2 * 3600)
    assert confirmations(desk, ["ada@customer.example"]) == ["withheld"]
    desk.clock.advance(24 * 3600)
    assert confirmations(desk, ["ada@customer.example"]) == ["queued"]


def test_two_hundred_confirmations_an_hour_are_the_end(desk):
    crowd = [f"customer@crowd{number}.example" for number in range(201)]
    assert confirmations(desk, crowd) == ["queued"] * 200 + ["withheld"]
    desk.clock.advance(3601)
    assert confirmations(desk, crowd[-1:]) == ["queued"]


def test_the_caps_are_columns_in_force_for_the_next_mail(desk):
    desk.execute("UPDATE email_account SET confirmations_per_address_hour = 1")
    assert confirmations(desk, ["ada@customer.example"] * 2) == ["queued", "withheld"]
    desk.execute("UPDATE email_account SET confirmations_per_hour = 0")
    assert confirmations(desk, ["bob@customer.example"]) == ["withheld"]


def test_withheld_confirmations_do_not_count(desk):
    mail = desk.mail(headers={"X-Auto-Response-Suppress": "All"})
    for number in range(4):
        desk.post(mail | {"message_id": f"<{number}@suppress.example>"})
    assert confirmations(desk, ["ada@customer.example"]) == ["queued"]


# Where it lands -----------------------------------------------------------------------------------

# (header, value, kind, queue)
QUEUES = [
    ("Auto-Submitted", "no", "human", "Support"),
    ("Auto-Submitted", "auto-replied", "auto-reply", "Automatic"),
    ("X-Failed-Recipients", "bob@customer.example", "bounce", "Automatic"),
    ("Auto-Submitted", "auto-generated", "machine", "Support"),
    ("List-Id", "<talk.lists.example.org>", "list", "Support"),
    ("Precedence", "bulk", "bulk", "Support"),
]


def queue_of(desk, reference):
    """The name of the queue that the ticket is in."""
    [(name,)] = desk.sql("SELECT queue.name FROM ticket JOIN queue ON queue.id = ticket.queue"
                         " WHERE reference = ?", reference)
    return name


def status_of(desk, reference):
    return desk.sql("SELECT status FROM ticket WHERE reference = ?", reference)[0][0]


@pytest.mark.parametrize("name, value, kind, queue", QUEUES)
def test_only_unmatched_replies_and_bounces_leave_the_default_queue(bare, name, value, kind, queue):
    answer = by_both_doors(bare, bare.mail(headers={name: value}))
    assert answer["kind"] == kind
    assert queue_of(bare, answer["ticket"]) == queue


SECOND = {"subject": "Re: Printer on fire", "message_id": "<second@customer.example>",
          "in_reply_to": "<first@customer.example>"}

# (headers, kind of the answer to a closed ticket, status of the ticket then)
ANSWERS = [
    ({}, "human", "open"),
    ({"X-Auto-Response-Suppress": "All"}, "human", "open"),
    ({"Auto-Submitted": "auto-replied"}, "auto-reply", "closed"),
    ({"X-Failed-Recipients": "ada@customer.example"}, "bounce", "closed"),
    ({"Auto-Submitted": "auto-generated"}, "machine", "closed"),
    ({"Precedence": "bulk"}, "bulk", "closed"),
]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("headers, kind, status", ANSWERS)
def test_only_a_person_s_answer_reopens_a_closed_ticket(bare, door, headers, kind, status):
    reference = deliver(bare, bare.mail(), door)["ticket"]
    bare.run("close", reference)
    answer = deliver(bare, bare.mail(**SECOND, headers=headers), door)
    assert (answer["status"], answer["ticket"], answer["kind"]) == ("appended", reference, kind)
    assert answer["confirmation"] == "not due"
    assert (status_of(bare, reference), queue_of(bare, reference)) == (status, "Support")
    assert (bare.count("ticket"), bare.count("outbox")) == (1, 1)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("headers, kind, status", ANSWERS)
def test_no_answer_closes_an_open_ticket(bare, door, headers, kind, status):
    reference = deliver(bare, bare.mail(), door)["ticket"]
    deliver(bare, bare.mail(**SECOND, headers=headers), door)
    assert status_of(bare, reference) == "open"


def bounce_of(message_id, returned):
    """A delivery report; its third part, of the type `returned`, shows our Message-ID."""
    body = "\n\nWe received your message.\n" if returned == "message/rfc822" else "\n"
    return f"""Return-Path: <>
From: Mail Delivery System <MAILER-DAEMON@mx.customer.example>
To: support@helpdesk.example
Subject: Undelivered Mail Returned to Sender
Message-ID: <report.1@mx.customer.example>
Auto-Submitted: auto-replied
MIME-Version: 1.0
Content-Type: multipart/report; report-type=delivery-status; boundary="report"

--report
Content-Type: text/plain; charset=us-ascii

<ada@customer.example>: mailbox full

--report
Content-Type: message/delivery-status

Reporting-MTA: dns; mx.customer.example

Final-Recipient: rfc822; ada@customer.example
Action: failed
Status: 5.2.2

--report
Content-Type: {returned}

From: Support <support@helpdesk.example>
To: ada@customer.example
Subject: We received your message
Message-ID: {message_id}{body}
--report--
""".encode()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("returned", ["message/rfc822", "text/rfc822-headers"])
@pytest.mark.parametrize("closed", [False, True])
def test_the_bounce_of_a_confirmation_finds_its_ticket(bare, door, returned, closed):
    reference = deliver(bare, bare.mail(), door)["ticket"]
    [(message_id,)] = bare.sql("SELECT message_id FROM message WHERE direction = 'out'")
    if closed:
        bare.run("close", reference)
    answer = deliver(bare, bounce_of(message_id, returned), door)
    assert (answer["status"], answer["ticket"]) == ("appended", reference)
    assert (answer["kind"], answer["confirmation"]) == ("bounce", "not due")
    assert status_of(bare, reference) == ("closed" if closed else "open")
    assert (bare.count("ticket"), bare.count("outbox")) == (1, 1)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("returned", ["message/rfc822", "text/rfc822-headers"])
def test_the_bounce_of_a_stranger_s_mail_waits_in_automatic(bare, door, returned):
    deliver(bare, bare.mail(), door)
    answer = deliver(bare, bounce_of("<never.sent@helpdesk.example>", returned), door)
    assert (answer["status"], answer["confirmation"]) == ("created", "withheld")
    assert queue_of(bare, answer["ticket"]) == "Automatic"


@pytest.mark.parametrize("door", DOORS)
def test_a_vacation_reply_to_a_confirmation_finds_its_ticket(bare, door):
    reference = deliver(bare, bare.mail(), door)["ticket"]
    [(message_id,)] = bare.sql("SELECT message_id FROM message WHERE direction = 'out'")
    answer = deliver(bare, bare.mail(subject="Automatic reply: We received your message",
                                     message_id="<away@customer.example>",
                                     in_reply_to=message_id), door)
    assert (answer["status"], answer["ticket"]) == ("appended", reference)
    assert (answer["kind"], answer["confirmation"]) == ("auto-reply", "not due")
