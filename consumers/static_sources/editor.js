/* The code editor of `where` (SQL) and `transform` (Lua): CodeMirror 6, bundled into consumers/static/console/editor.js.

   Built by consumers/static_sources/build.sh. Each <div data-editor="sql|lua"> holds a textarea, which stays what the form
   sends. The editor lives in a shadow root: there it may bring its styles without a style element, which the content
   policy forbids. */
import { autocompletion, completionKeymap } from "@codemirror/autocomplete";
import { defaultKeymap, history, historyKeymap } from "@codemirror/commands";
import { PostgreSQL, sql } from "@codemirror/lang-sql";
import { HighlightStyle, StreamLanguage, bracketMatching, indentOnInput, syntaxHighlighting } from "@codemirror/language";
import { lua } from "@codemirror/legacy-modes/mode/lua";
import { EditorState } from "@codemirror/state";
import { EditorView, drawSelection, keymap, lineNumbers, placeholder } from "@codemirror/view";
import { tags } from "@lezer/highlight";

const looks = EditorView.theme({
  "&": { color: "var(--sq-strong)", backgroundColor: "var(--sq-panel)", fontSize: "13px", border: "1px solid var(--sq-line)", borderRadius: "7px" },
  "&.cm-focused": { outline: "2px solid var(--sq-button)" },
  ".cm-content": { fontFamily: "ui-monospace, Menlo, Consolas, monospace", caretColor: "var(--sq-strong)", padding: "8px 0" },
  ".cm-cursor": { borderLeftColor: "var(--sq-strong)" },
  ".cm-gutters": { backgroundColor: "var(--sq-raised)", color: "var(--sq-soft)", border: "none", borderRadius: "7px 0 0 7px" },
  ".cm-selectionBackground, &.cm-focused .cm-selectionBackground": { backgroundColor: "var(--sq-info-bg) !important" },
  ".cm-placeholder": { color: "var(--sq-soft)" },
  ".cm-tooltip": { backgroundColor: "var(--sq-panel)", color: "var(--sq-text)", border: "1px solid var(--sq-line)" },
  ".cm-tooltip-autocomplete > ul > li[aria-selected]": { backgroundColor: "var(--sq-button)", color: "#fff" },
});
const colours = HighlightStyle.define([
  { tag: tags.keyword, color: "var(--sq-link)", fontWeight: "600" },
  { tag: [tags.string, tags.special(tags.string)], color: "var(--sq-ok)" },
  { tag: [tags.number, tags.bool, tags.null], color: "var(--sq-warn)" },
  { tag: tags.comment, color: "var(--sq-soft)", fontStyle: "italic" },
]);

function languageOf(part) {
  if (part.dataset.editor === "lua") return [StreamLanguage.define(lua)];
  const columns = (part.dataset.columns || "").split(",").filter(Boolean);
  const words = [...columns, "new", "old", "action", "table_schema", "table_name"];
  return [sql({ dialect: PostgreSQL, schema: Object.fromEntries(words.map((word) => [word, []])) })];
}

function mount(part) {
  if (part.dataset.mounted) return;
  part.dataset.mounted = "1";
  const field = part.querySelector("textarea");
  const host = document.createElement("div");
  part.append(host);
  const root = host.attachShadow({ mode: "open" });
  const send = EditorView.updateListener.of((update) => {
    if (update.docChanged) {
      field.value = update.state.doc.toString();
      field.dispatchEvent(new Event("input", { bubbles: true }));
    }
  });
  const view = new EditorView({
    parent: root,
    root,
    state: EditorState.create({
      doc: field.value,
      extensions: [
        lineNumbers(), history(), drawSelection(), bracketMatching(), indentOnInput(), autocompletion(), EditorView.lineWrapping,
        keymap.of([...defaultKeymap, ...historyKeymap, ...completionKeymap]), syntaxHighlighting(colours), looks, send,
        placeholder(field.placeholder), ...languageOf(part),
        EditorView.contentAttributes.of({ "aria-label": part.dataset.label || field.name }),
      ],
    }),
  });
  field.hidden = true;
  part.editor = view;
}

function mountAll() {
  document.querySelectorAll("[data-editor]").forEach(mount);
}
document.addEventListener("DOMContentLoaded", mountAll);
document.addEventListener("htmx:afterSettle", mountAll);
