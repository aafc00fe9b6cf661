// Shows all cases of a data set, or the one that is chosen. Without scripts, and on paper, all are there.
document.querySelectorAll(".picker").forEach((picker) => {
  const select = picker.querySelector("select");
  const cases = [...picker.parentElement.querySelectorAll("article.case")];
  const show = () => cases.forEach((shown, place) =>
    shown.classList.toggle("elsewhere", select.value !== "" && Number(select.value) !== place));
  select.addEventListener("change", show);
  picker.querySelectorAll("button").forEach((button) => button.addEventListener("click", () => {
    const place = select.value === "" ? -1 : Number(select.value);
    select.value = String(Math.min(Math.max(place + Number(button.value), 0), cases.length - 1));
    show();
  }));
  picker.hidden = false;
  show();
});
