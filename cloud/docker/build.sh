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

IMAGE='' PUSH=no PLATFORM=linux/amd64

main() {
  local kind=${1:-} root
  case $kind in
    '') usage_error "which image: tpu or cuda?" ;;
    -h | --help) print_help "$0" && exit 0 ;;
    tpu | cuda) shift ;;
    *) usage_error "$kind: expected tpu or cuda" ;;
  esac
  while [ $# -gt 0 ]; do
    case $1 in
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case $1 in
      --push) PUSH=yes && shift && continue ;;
      --dry-run) DRY_RUN=yes && shift && continue ;;
      --image | --platform) value_of "$1" $# "${2:-}" ;;
      *) usage_error "$1 is no option" ;;
    esac
    if [ "$1" = --image ]; then IMAGE=$2; else PLATFORM=$2; fi
    shift 2
  done
  [ -n "$IMAGE" ] || usage_error "--image is missing: REGISTRY/NAME:TAG"
  need docker
  root=$(cd "$CLOUD/.." && pwd)
  run docker build --platform="$PLATFORM" --file="$CLOUD/docker/Dockerfile.$kind" --tag="$IMAGE" "$root" ||
    fail "the image was not built (docker's words are above)"
  run docker run --rm --platform="$PLATFORM" "$IMAGE" || fail "the image was built, and jaxtune does not start in it"
  if [ "$PUSH" = yes ]; then retry run docker push "$IMAGE" || fail "$IMAGE was not pushed"; fi
}

main "$@"
