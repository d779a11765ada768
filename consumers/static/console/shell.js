/* What every console page needs: Alpine without eval, copy buttons, pausable polling. No inline script exists anywhere.

   unfold's templates carry Alpine expressions. Alpine's CSP build reads most of them with a parser of its own; the few that
   name globals or hold several statements are given here as functions. */
"use strict";

htmx.config.allowEval = false;
htmx.config.includeIndicatorStyles = false;

const rewritten = {
  "sidebarDesktopOpen = !sidebarDesktopOpen; localStorage.setItem('sidebarDesktopOpen', sidebarDesktopOpen ? '1' : '0');": "toggleSidebar()",
  "openSearchResults = false; if ($refs.searchInput.value === '') { $refs.searchInput.blur() } else { $refs.searchInput.value = '' }": "leaveSearch()",
  "openSearchResults = true; currentIndex = 0": "enterSearch()",
  "if (!$event.metaKey && !$event.ctrlKey) selectItem(true, false)": "selectItem(true, false)",
  "if (!$event.metaKey && !$event.ctrlKey) selectItem(false, false)": "selectItem(false, false)",
};

function shell() {
  return {
    activeTab: document.body.dataset.tab || "general",
    sidebarMobileOpen: false,
    sidebarDesktopOpen: localStorage.getItem("sidebarDesktopOpen") !== "0",
    toggleSidebar() {
      this.sidebarDesktopOpen = !this.sidebarDesktopOpen;
      localStorage.setItem("sidebarDesktopOpen", this.sidebarDesktopOpen ? "1" : "0");
    },
  };
}

/* unfold's menu, user and theme switches are spans: by keyboard they become buttons. */
function makeOperable() {
  const names = { dock_to_right: "Menu", more_horiz: "More" };
  for (const element of document.querySelectorAll("span[x-on\\:click], div[x-on\\:click], a[x-on\\:click]:not([href])")) {
    if (element.closest("[role=button]")) continue;
    element.tabIndex = 0;
    element.setAttribute("role", "button");
    const name = names[element.textContent.trim()];
    if (name) element.setAttribute("aria-label", name);
  }
}
document.addEventListener("keydown", (event) => {
  if ((event.key === "Enter" || event.key === " ") && event.target.matches("[role=button]:not(button)")) {
    event.preventDefault();
    event.target.click();
  }
});

document.addEventListener("alpine:init", () => {
  document.body.setAttribute("x-data", "shell");
  document.body.removeAttribute("x-init");
  for (const element of document.querySelectorAll("form[x-bind\\:action]")) element.removeAttribute("x-bind:action");
  for (const element of document.querySelectorAll("*")) {
    for (const attribute of [...element.attributes]) {
      const known = attribute.name.startsWith("x-") ? rewritten[attribute.value] : undefined;
      if (known) attribute.value = known;
    }
  }
  makeOperable();
  Alpine.data("shell", shell);
  Alpine.data("theme", theme);
  Alpine.data("searchForm", searchForm);
  Alpine.data("searchDropdown", () => ({
    ...searchDropdown(),
    enterSearch() { this.openSearchResults = true; this.currentIndex = 0; },
    leaveSearch() {
      this.openSearchResults = false;
      const input = this.$refs.searchInput;
      if (input.value === "") input.blur(); else input.value = "";
    },
  }));
  Alpine.data("searchCommand", searchCommand);
});

/* Parts of a page that fetch themselves anew: data-poll="seconds" beside hx-trigger="poll". They rest while nobody looks,
   while somebody types, selects text, has ticked something or moves by keyboard in them, and while paused; an answer that comes then is dropped, as
   is one in the middle of a click. What was unfolded stays so. */
let isPressing = false;
document.addEventListener("pointerdown", (event) => { isPressing = event.button === 0; }, true);
document.addEventListener("pointermove", (event) => { if (!event.buttons) isPressing = false; }, true);  // it ended elsewhere
for (const end of ["pointerup", "pointercancel"]) {
  document.addEventListener(end, () => setTimeout(() => { isPressing = false; }), true);  // the click comes after it
}

function isInUse(part) {
  if (part.contains(document.activeElement) && document.activeElement.matches("input, textarea, select, :focus-visible")) return true;
  if (part.querySelector("input:checked")) return true;
  return part.contains(document.getSelection().anchorNode) && !document.getSelection().isCollapsed;
}

setInterval(() => {
  if (document.hidden) return;
  const now = Date.now();
  for (const part of document.querySelectorAll("[data-poll]")) {
    const due = Number(part.dataset.polledAt || 0) + Number(part.dataset.poll) * 1000;
    if (!part.dataset.polledAt) { part.dataset.polledAt = now; continue; }
    if (now < due || part.dataset.paused) continue;
    if (isPressing || isInUse(part)) continue;
    part.dataset.polledAt = now;
    htmx.trigger(part, "poll");
  }
}, 250);

document.addEventListener("htmx:beforeSwap", (event) => {
  if (event.detail.requestConfig.triggeringEvent?.type === "poll" && (isPressing || isInUse(event.detail.target))) {
    event.detail.shouldSwap = false;
    return;
  }
  const open = [...event.detail.target.querySelectorAll("details[open][data-kept]")].map((part) => part.dataset.kept);
  if (!open.length) return;
  document.addEventListener("htmx:afterSwap", () => {
    for (const kept of open) document.querySelector(`details[data-kept="${kept}"]`)?.setAttribute("open", "");
  }, { once: true });
});

document.addEventListener("click", (event) => {
  const copy = event.target.closest("[data-copy]");
  if (copy) return copyText(copy);
  const pause = event.target.closest("[data-pause]");
  if (pause) return togglePause(pause);
  const all = event.target.closest("[data-check-all]");
  if (all) for (const box of document.querySelectorAll(all.dataset.checkAll)) box.checked = all.checked;
});

function copyText(button) {
  const text = button.parentElement.querySelector("pre").innerText;
  const done = () => {
    const before = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = before; }, 1500);
  };
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(done);
  const area = document.createElement("textarea");  // without https there is no clipboard object
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
  done();
}

function togglePause(button) {
  const part = document.querySelector(button.dataset.pause);
  const paused = !part.dataset.paused;
  if (paused) part.dataset.paused = "1"; else delete part.dataset.paused;
  button.textContent = paused ? "Resume" : "Pause";
  button.setAttribute("aria-pressed", paused ? "true" : "false");
  button.parentElement.classList.toggle("is-paused", paused);
}

/* Forms show what belongs to the choice made: data-show-when="name=value". */
function applyChoices() {
  for (const part of document.querySelectorAll("[data-show-when]")) {
    const [name, value] = part.dataset.showWhen.split("=");
    const chosen = document.querySelector(`[name="${name}"]:checked`) || document.querySelector(`select[name="${name}"]`);
    part.hidden = !chosen || !value.split("|").includes(chosen.value);
  }
}
document.addEventListener("change", applyChoices);
document.addEventListener("DOMContentLoaded", applyChoices);
document.addEventListener("htmx:afterSettle", applyChoices);

/* "All" means all: what is ticked does not count then. */
document.addEventListener("click", (event) => {
  const all = event.target.closest("[data-uncheck]");
  if (all) for (const box of document.querySelectorAll(all.dataset.uncheck)) box.checked = false;
}, true);
