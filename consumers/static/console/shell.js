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
