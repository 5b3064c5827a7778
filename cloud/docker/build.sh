#!/usr/bin/env bash
# Builds an image with jaxtune, tries it, and pushes it where asked.
#
#   build.sh tpu  --image REGISTRY/NAME:TAG [--push]
#   build.sh cuda --image REGISTRY/NAME:TAG [--push]
#
#   --platform P   (linux/amd64: what clouds have, whatever this machine is)
#   --dry-run      print every command, run none
#
# Exit codes: 0 built; 1 error; 2 usage.
set -euo pipefail
# shellcheck source=cloud/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

IMAGE='' PUSH=no PLATFORM=linux/amd64 REST=()

take_flag() {
  case $1 in
    --push) PUSH=yes ;;
    *) return 1 ;;
  esac
}

take_value() {
  case $1 in
    --image) IMAGE=$2 ;;
    --platform) PLATFORM=$2 ;;
    *) return 1 ;;
  esac
}

main() {
  local kind=${1:-} root
  case $kind in
    '') usage_error "which image: tpu or cuda?" ;;
    -h | --help) print_help "$0" && exit 0 ;;
    tpu | cuda) shift ;;
    *) usage_error "$kind: expected tpu or cuda" ;;
  esac
  read_words "$@"
  [ "${#REST[@]}" -eq 0 ] || usage_error "${REST[0]} is no option"
  [ -n "$IMAGE" ] || usage_error "--image is missing: REGISTRY/NAME:TAG"
  need docker
  root=$(cd "$CLOUD/.." && pwd)
  run docker build --platform="$PLATFORM" --file="$CLOUD/docker/Dockerfile.$kind" --tag="$IMAGE" "$root" ||
    fail "the image was not built (docker's words are above)"
  run docker run --rm --platform="$PLATFORM" "$IMAGE" || fail "the image was built, and jaxtune does not start in it"
  if [ "$PUSH" = yes ]; then retry run docker push "$IMAGE" || fail "$IMAGE was not pushed"; fi
}

main "$@"
