"""The index's tables. Changes go through `migrations/`."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData()

#: One row a store path, forever: the pin of its fingerprint, and how it was admitted.
path = Table(
    "path",
    metadata,
    Column("hash_part", String(32), primary_key=True),
    Column("name", String(211), nullable=False),
    Column("nar_hash", LargeBinary(32), nullable=False),
    Column("nar_size", BigInteger, nullable=False),
    Column("refs", Text, nullable=False),
    Column("deriver", String(250)),
    Column("ca", String(250)),
    Column("signatures", Text, nullable=False),
    #: Names of the operator's keys whose signatures among those were made or verified here.
    Column("ours", Text, nullable=False, server_default=""),
    Column("extra", Text, nullable=False),
    Column("nar_file", String(80), ForeignKey("nar.file"), nullable=False),
    Column("evidence", String(400), nullable=False),
    Column("admitted_at", Float, nullable=False),
    #: A withdrawn path is asked for anew before it is served again; its pin stays.
    Column("withdrawn", Boolean, nullable=False),
    Index("path_nar_file", "nar_file"),
    Index("path_nar_hash", "nar_hash"),
)

#: One row a file name below nar/, forever bound to one NAR in one compression.
nar = Table(
    "nar",
    metadata,
    Column("file", String(80), primary_key=True),
    Column("nar_hash", LargeBinary(32), nullable=False),
    Column("nar_size", BigInteger, nullable=False),
    Column("compression", String(16), nullable=False),
    Column("file_hash", LargeBinary(32)),
    Column("file_size", BigInteger),
    Column("upstream", String(2048), nullable=False),
    Column("url", String(2048), nullable=False),
    #: Where the bytes are published, when the name was not that of their true hash.
    Column("published_as", String(80)),
    Column("stored", Boolean, nullable=False),
    #: When the stored bytes were last hashed, as Unix time; NULL: not known.
    Column("verified_at", Float),
    Index("nar_source", "upstream", "url"),
    Index("nar_file_hash", "file_hash"),
)

#: Upstream files that were not the NAR they were named for: not taken again for a time.
refusal = Table(
    "refusal",
    metadata,
    Column("upstream", String(2048), primary_key=True),
    Column("url", String(2048), primary_key=True),
    Column("nar_hash", LargeBinary(32), primary_key=True),
    Column("reason", String(40), nullable=False),
    Column("until", Float, nullable=False),
)

#: Realisations in either spelling, by the path under which they are asked for.
realisation = Table(
    "realisation",
    metadata,
    Column("key", String(600), primary_key=True),
    #: Without signatures.
    Column("body", LargeBinary, nullable=False),
    Column("signatures", Text, nullable=False),
    Column("ours", Text, nullable=False),
    Column("evidence", String(400), nullable=False),
    Column("admitted_at", Float, nullable=False),
    Column("withdrawn", Boolean, nullable=False),
)

#: What is in storage, and what waits, kept beside the rows that it counts by triggers (migration 0008).
total = Table(
    "total",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("nar_bytes", BigInteger, nullable=False),
    Column("waiting", BigInteger, nullable=False, server_default="0"),
)

#: How many rows of `path` and of `realisation` are in force, by whose signatures of ours they have; kept
#: by triggers, too. There are as many rows as sets of keys that the operator had at a time.
served = Table(
    "served",
    metadata,
    #: The table.
    Column("kind", String(16), primary_key=True),
    #: As the table has it.
    Column("ours", Text, primary_key=True),
    Column("rows", BigInteger, nullable=False),
)

#: The one row of what the storage folder of this index is marked with.
folder = Table(
    "folder",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("mark", String(64), nullable=False),
    #: False until the folder bears it.
    Column("settled", Boolean, nullable=False),
)

#: Store paths in force whose verified, stored content waits for its Sigstore signature: triggers take out
#: what is withdrawn, or whose file is gone.
waiting = Table(
    "waiting",
    metadata,
    Column("hash_part", String(32), ForeignKey("path.hash_part"), primary_key=True),
    Column("since", Float, nullable=False),
    Index("waiting_since", "since"),
)

#: Bundles over statements; the bytes are in storage, as `attestations/<hex>.sigstore.json`.
attestation = Table(
    "attestation",
    metadata,
    Column("digest", LargeBinary(32), primary_key=True),
    Column("predicate_type", String(250), nullable=False),
    #: When it was signed here or brought here.
    Column("made_at", Float, nullable=False),
    #: Who signed it, as was verified when it was brought; NULL: narseal itself.
    Column("signer", String(2100)),
    #: SHA-256 of the statement that is signed, where somebody brought it.
    Column("statement", LargeBinary(32)),
    Index("attestation_statement", "statement", "signer"),
)

#: Which file and NAR digests a statement covers.
subject = Table(
    "subject",
    metadata,
    Column("digest", LargeBinary(32), primary_key=True),
    Column("attestation", LargeBinary(32), ForeignKey("attestation.digest"), primary_key=True),
)

#: Which path was attested as which file: none is signed twice.
attested = Table(
    "attested",
    metadata,
    Column("hash_part", String(32), ForeignKey("path.hash_part"), primary_key=True),
    Column("file", String(80), ForeignKey("nar.file"), primary_key=True),
    Column("attestation", LargeBinary(32), ForeignKey("attestation.digest"), nullable=False),
)

#: Bundles over single files.
file_signature = Table(
    "file_signature",
    metadata,
    Column("file", String(80), ForeignKey("nar.file"), primary_key=True),
    Column("bundle", LargeBinary, nullable=False),
)

#: What the operator revoked.
revocation = Table(
    "revocation",
    metadata,
    Column("kind", String(16), primary_key=True),
    Column("name", String(2048), primary_key=True),
    Column("issuer", String(2048), primary_key=True),
    Column("since", Float, nullable=False),
    Column("reason", String(400), nullable=False),
    Column("revoked_at", Float, nullable=False),
)
