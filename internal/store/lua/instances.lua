-- instances.lua: reads the live and the dead servers, and the time. It writes nothing.
--
-- KEYS[1] live servers  KEYS[2] dead servers
-- ARGV[1] maximum number of each
-- Reply: {now, {incarnation, deadline, ...}, {incarnation, time of death, ...}}, the earliest first

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local function int(n)
  return string.format('%.0f', n)
end
local function list(key)
  local l = redis.call('ZRANGE', key, 0, tonumber(ARGV[1]) - 1, 'WITHSCORES')
  for i = 2, #l, 2 do
    l[i] = int(tonumber(l[i]))
  end
  return l
end
return { int(now), list(KEYS[1]), list(KEYS[2]) }
