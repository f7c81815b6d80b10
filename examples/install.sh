#!/bin/sh
# Install a release archive with cosign alone: nothing of it is unpacked or run before it is verified.
#
#   BASE=https://releases.example.org/app-1.2 FILE=app.tar.gz \
#   IDENTITY=https://github.com/example/app/.github/workflows/release.yml@refs/tags/v1.2 \
#   ISSUER=https://token.actions.githubusercontent.com PREFIX=$HOME/.local sh install.sh
#
# With a key in the place of an identity: KEY=cosign.pub. With a private Sigstore: TRUSTED_ROOT=file.
set -eu
: "${BASE:?where the files are}" "${FILE:?the archive}" "${PREFIX:?where to install}"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
curl -fsSL --proto '=https,http' -o "$work/archive" "$BASE/$FILE"
curl -fsSL --proto '=https,http' -o "$work/bundle" "$BASE/$FILE.sigstore.json"

if [ -n "${KEY:-}" ]; then
  set -- --key "$KEY"
  [ -n "${TRUSTED_ROOT:-}" ] || set -- "$@" --insecure-ignore-tlog
else
  set -- --certificate-identity "${IDENTITY:?who signed it}" --certificate-oidc-issuer "${ISSUER:?of the identity}"
fi
[ -z "${TRUSTED_ROOT:-}" ] || set -- "$@" --trusted-root "$TRUSTED_ROOT"
cosign verify-blob --bundle "$work/bundle" "$@" "$work/archive"

mkdir -p "$PREFIX"
tar -xzf "$work/archive" -C "$PREFIX" --no-same-owner
echo "installed $FILE into $PREFIX"
