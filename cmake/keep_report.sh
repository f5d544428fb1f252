#!/bin/sh
# Run a compiler, and keep what it prints beside the object that it makes: tests/test_build.py reads it.
for argument; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
"$@" >"$object.report" 2>&1
status=$?
cat "$object.report"
exit $status
