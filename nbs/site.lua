-- Two changes of every page of the site; the notebooks stay as they are.
-- 1. The Colab badge, an image of another host, becomes a link.
-- 2. Code that defines `name` gets the anchor `name`, which links between pages point to.
local seen = {}

function Image(image)
  if image.src:match("colab%-badge%.svg$") then return pandoc.Str("Open in Colab") end
end

local function as_button(block)
  if #block.content ~= 1 then return end
  local link = block.content[1]
  if link.t ~= "Link" or not link.target:match("^https://colab%.research%.google%.com/") then return end
  return pandoc.Div({pandoc.Plain({link})}, pandoc.Attr("", {"colab-button"}))
end

function Figure(figure)
  local found
  figure:walk({Link = function(link) found = as_button(pandoc.Plain({link})) or found end})
  return found
end

function Para(block) return as_button(block) end
function Plain(block) return as_button(block) end

local function anchor(anchors, name)
  if seen[name:lower()] then return end
  seen[name:lower()] = true
  table.insert(anchors, pandoc.Span({}, pandoc.Attr(name:lower())))
end

function CodeBlock(block)
  local anchors, class = {}, nil
  for line in block.text:gmatch("[^\n]+") do
    local name = line:match("^class%s+([%a_][%w_]*)") or line:match("^def%s+([%a_][%w_]*)")
    local method = line:match("^    def%s+([%a_][%w_]*)")
    if name then class = line:match("^class") and name; anchor(anchors, name) end
    if class and method then anchor(anchors, class .. "." .. method) end
  end
  if #anchors > 0 then return {pandoc.Plain(anchors), block} end
end
