/* The playground's receiver: the table is fetched anew each second. */
setInterval(async () => {
  const answer = await fetch("arrivals").catch(() => null);
  if (answer && answer.ok) document.getElementById("arrivals").innerHTML = await answer.text();
}, 1000);
