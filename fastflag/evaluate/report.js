const figures = JSON.parse(document.getElementById("figures").textContent);
const narrow = matchMedia("(max-width: 720px)"), dark = matchMedia("(prefers-color-scheme: dark)");

function look() {
  const css = getComputedStyle(document.documentElement);
  const [ink, soft, rule, card] = ["--ink", "--soft", "--rule", "--card"]
    .map(name => css.getPropertyValue(name).trim());
  const axis = { gridcolor: rule, zerolinecolor: rule, linecolor: rule, automargin: true,
    ticks: "outside", ticklen: 5, tickcolor: "rgba(0,0,0,0)",
    tickfont: { color: soft }, title: { font: { size: 12, color: soft }, standoff: 8 } };
  return { layout: {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
    margin: { l: 44, r: 10, t: 8, b: 30 }, hovermode: "x unified",
    hoverlabel: { bgcolor: card, bordercolor: rule, font: { color: ink, size: 12 } },
    legend: { orientation: "h", x: 0, y: 1.03, yanchor: "bottom" },
    dragmode: narrow.matches ? false : "zoom",
    xaxis: { ...axis, showgrid: false, nticks: narrow.matches ? 5 : 0 },
    yaxis: { ...axis, nticks: 6 } } };
}

function draw() {
  const template = look();
  for (const [name, figure] of Object.entries(figures))
    Plotly.react(name, figure.data, { ...figure.layout, template },
      { responsive: true, displayModeBar: false });
}

draw();
narrow.addEventListener("change", draw);
dark.addEventListener("change", draw);
