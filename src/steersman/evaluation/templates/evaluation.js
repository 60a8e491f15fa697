"use strict";
(() => {
  const filters = document.getElementById("filters");
  const items = [...document.querySelectorAll(".item")];
  if (!filters || !items.length) return;
  const control = (name) => document.getElementById("filter-" + name);
  const [task, kind, arm, outcome, search, status] =
    ["task", "kind", "arm", "outcome", "search", "status"].map(control);
  const texts = new Map(items.map((item) => [item, item.textContent.toLowerCase()]));

  const moved = (item) => {
    const arms = item.dataset.changed.split(" ").filter(Boolean);
    return arm.value ? arms.includes(arm.value) : arms.length > 0;
  };
  const wanted = (item) =>
    (!task.value || item.dataset.task === task.value) &&
    (!kind.value || item.dataset.kind === kind.value) &&
    (!outcome.value || moved(item) === (outcome.value === "changed")) &&
    texts.get(item).includes(search.value.trim().toLowerCase());

  const show = () => {
    let count = 0;
    for (const item of items) {
      item.hidden = !wanted(item);
      count += item.hidden ? 0 : 1;
      for (const answer of item.querySelectorAll(".answer"))
        answer.hidden = Boolean(arm.value) && answer.dataset.arm !== arm.value && answer.dataset.arm !== "0";
    }
    for (const part of document.querySelectorAll(".of-task"))
      part.hidden = !part.querySelector(".item:not([hidden])");
    status.textContent = `${count} of ${items.length} items shown`;
  };

  for (const each of [task, kind, arm, outcome]) each.addEventListener("change", show);
  search.addEventListener("input", show);
  control("reset").addEventListener("click", () => {
    for (const each of [task, kind, arm, outcome, search]) each.value = "";
    show();
  });
  filters.hidden = false;
  show();
})();
