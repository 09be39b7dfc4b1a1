-- positions.lua: reads the positions of rooms, hundreds per call.
--
-- KEYS: seq of each room
-- Reply: per room its position (see lib.lua), or ''

local reply = redis.call('MGET', unpack(KEYS))
for i = 1, #KEYS do
  reply[i] = reply[i] or ''
end
return reply
