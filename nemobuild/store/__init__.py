"""The store: what was made, kept by what it was made from, and what was published of it.

    objects/STAGE/KEY/          an artefact as it was made
    objects/STAGE/KEY.json      its record: what is known of it, and the digest of every file
    published/PROFILE.json      the publications of a profile, and which one is current
    places/*.json               which folder holds which object, so that ``gc`` spares it
    locks/                      files to lock; the kernel frees a lock when its holder dies

An object appears by one rename, whole or not at all, and never changes. Its key is the digest of everything that it
is made from, so an object that is there need not be made again, on whatever machine it was made.
"""

from nemobuild.store.objects import Gates, Publication, Store

__all__ = ["Gates", "Publication", "Store"]
