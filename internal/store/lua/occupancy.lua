-- occupancy.lua: reads the numbers of rooms, hundreds per call. It writes nothing.
--
-- KEYS: seq of each room, then members of each room
-- Reply: now, then per room its position (see lib.lua), or '', and its number of members

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local rooms = #KEYS / 2
local positions = redis.call('MGET', unpack(KEYS, 1, rooms))
local reply = { string.format('%.0f', now) }
for i = 1, rooms do
  reply[2 * i] = positions[i] or ''
  reply[2 * i + 1] = redis.call('HLEN', KEYS[rooms + i])
end
return reply
