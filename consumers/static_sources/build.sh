#!/bin/sh
# Bundle the code editor into one static file. Needs npm; the result is kept in the repository, so nobody else does.
set -e
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$here/editor.js" "$here/package.json" "$work"
[ -f "$here/package-lock.json" ] && cp "$here/package-lock.json" "$work"
cd "$work"
npm install --no-fund --no-audit --silent
node_modules/.bin/esbuild editor.js --bundle --minify --format=iife --target=es2022 --legal-comments=none --outfile=bundled.js
{
    echo "/* The code editor of the console, bundled by consumers/static_sources/build.sh: CodeMirror 6 and Lezer, Copyright (C) 2018 by"
    echo "   Marijn Haverbeke <marijn@haverbeke.berlin>, Adrian Heine and others, under the MIT licence (LICENSE.codemirror beside it). */"
    cat bundled.js
} > "$here/../static/console/editor.js"
cp node_modules/codemirror/LICENSE "$here/../static/console/LICENSE.codemirror"
cp package-lock.json "$here/package-lock.json"
cp node_modules/@alpinejs/csp/dist/cdn.min.js "$here/../static/unfold/js/alpine/alpine.js"
